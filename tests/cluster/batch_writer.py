"""A process that works through batches and acknowledges on stdout what is stored, until it is killed."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from chiron_engine.cluster.batch_records import NewBatch, Progress
from chiron_engine.cluster.batch_store import BatchStore
from tests.cluster.batch_store_cases import NOW, new_lines, recovered


def main(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    store = BatchStore(directory)
    waiting = [line.line_id for line in recovered(store)]
    print("ready", flush=True)
    for number in range(1_000_000):
        lines = store.submit(NewBatch(f"b-{seed}-{number}"), new_lines(8), NOW).lines
        print("batch", f"b-{seed}-{number}", flush=True)
        waiting += [line.line_id for line in lines]
        rng.shuffle(waiting)
        claims = store.claim(waiting[:10], NOW)
        store.checkpoint(Progress(claim.line_id, claim.attempt, [1, 2, 3]) for claim in claims)
        waiting = waiting[10:]
        for claim in claims:
            if rng.random() < 0.2:
                store.evict(claim.line_id, claim.attempt, [1, 2, 3, 4], NOW)
                waiting.append(claim.line_id)
                continue
            output = f"{claim.line_id}:{claim.attempt}"
            if store.finish(claim.line_id, claim.attempt, output.encode(), NOW):
                print("done", output, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
