"""The side of an engine that is measured: settings in, then passes, one JSON object a line each, and an
answer to each. Runs in the environment of that engine, so it imports nothing but the standard library."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


class Engine(Protocol):
    """What a worker module makes of its settings."""

    def generate(self, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        """The output ids of all prompts, run at once: greedy, ends of sequence ignored, nothing kept
        from earlier calls. This call is what is timed."""


@dataclass(frozen=True, slots=True)
class Started:
    """versions: of the packages that compute. configuration: in what the model is run, for the report."""

    engine: Engine
    versions: dict[str, str]
    configuration: dict[str, Any] = field(default_factory=dict)


PR_SET_PDEATHSIG = 1  # of Linux' prctl


def serve(start: Callable[[dict[str, Any]], Started]) -> None:
    """Answer until the input ends. What goes wrong is the answer to what was asked."""
    end_with_parent()
    # Whatever the engine and its children print goes to the error stream; answers keep the real output.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if engine is None:
                started = start(asked)
                engine = started.engine
                answer: dict[str, Any] = {
                    "versions": started.versions,
                    "configuration": started.configuration,
                }
            else:
                answer = timed(engine, asked["prompts"], asked["output_tokens"])
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


def end_with_parent() -> None:
    """A stopped process would outlive the one that is to wake it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def timed(engine: Engine, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
    start = time.perf_counter()
    outputs = engine.generate(prompts, output_tokens)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "outputs": outputs}
