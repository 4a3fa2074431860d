"""Each check in a process of its own, so that a crash or a hang ends only that check."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from multiprocessing.connection import Connection

from scripts.family_sweep.check import FAILED, Outcome, check_type


def check_apart(kind: str, architecture: str, timeout_s: float) -> Outcome:
    """`check_type` in a child process; failed where that ends without an answer or takes too long.

    The child is forked: importing transformers anew for every type would take most of the time.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, kind, architecture))
    child.start()
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            return Outcome(kind, architecture, FAILED, f"no answer within {timeout_s:g} s")
        answer: Outcome = receiver.recv()
        return answer
    except EOFError:
        child.join(1)
        return Outcome(kind, architecture, FAILED, f"its process ended with code {child.exitcode}")
    finally:
        child.kill()
        child.join()
        receiver.close()


def _answer(sender: Connection, kind: str, architecture: str) -> None:
    # A verdict of the self-check that an earlier run kept would hide a change of the engine.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CHIRON_CACHE"] = cache
        sender.send(check_type(kind, architecture))
