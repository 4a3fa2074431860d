"""A writer killed at random moments: what it acknowledged is there, once."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from chiron_engine.cluster.batch_records import LineState
from chiron_engine.cluster.batch_store import BatchStore
from tests.cluster.batch_store_cases import NOW, recovered, results_of

WRITER = Path(__file__).parent / "batch_writer.py"
ROUNDS = 6


def run_and_kill(directory: Path, seed: int, acks: int, seconds: float) -> list[list[str]]:
    """What the writer acknowledged, in words; it was killed so long after that many of them."""
    command = [sys.executable, str(WRITER), str(directory), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        said = "".join(writer.stdout.readline() for _ in range(acks))
        time.sleep(seconds)
        writer.kill()
        said += writer.stdout.read()
    complete, _, _ = said.rpartition("\n")
    return [line.split() for line in complete.splitlines()]


def test_a_killed_writer_loses_and_doubles_nothing(tmp_path: Path) -> None:
    rng = random.Random(5)
    batches: set[str] = set()
    outputs: dict[int, str] = {}
    for seed in range(ROUNDS):
        for kind, value in run_and_kill(tmp_path, seed, rng.randint(1, 60), rng.uniform(0, 0.03)):
            if kind == "batch":
                batches.add(value)
                continue
            line_id = int(value.split(":")[0])
            assert line_id not in outputs, "acknowledged twice"
            outputs[line_id] = value
    assert len(batches) >= ROUNDS and outputs

    with BatchStore(tmp_path) as store:
        assert store._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        known = {batch.batch_id: batch for batch in store.list(1_000_000)}
        assert batches <= set(known)
        assert all(sum(batch.counts.values()) == batch.total == 8 for batch in known.values())
        ended = [result for batch_id in known for result in results_of(store, batch_id).results]
        assert {result.state for result in ended} == {LineState.DONE}
        found = [result.output.decode() for result in ended]
        assert len(found) == len(set(found))
        assert set(outputs.values()) <= set(found)
        # Every line has one result or waits, and those that wait can be run to the end.
        waiting = recovered(store)
        assert len(waiting) + len(ended) == 8 * len(known)
        with store.transaction():
            for claim in store.claim([line.line_id for line in waiting], NOW):
                assert list(claim.produced) in ([], [1, 2, 3], [1, 2, 3, 4])
                assert store.finish(claim.line_id, claim.attempt, b"", NOW)
        assert store.counts()[LineState.DONE] == 8 * len(known)
        assert all(batch.finished_at is not None for batch in store.list(1_000_000))
