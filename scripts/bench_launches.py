#!/usr/bin/env python3
"""What a launch of Triton's kernels costs the host before Triton has it: checks of the arguments, sizes,
results to write to. No GPU is needed: nothing is launched.

Prints JSON: microseconds of a call by kernel, the least over all rounds, for the shapes of Llama 8B. --beside
DIR times another checkout in turns with this one, round by round, and adds how many times as long it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
CALLS = 300
REPEATS = 5
HEADS, KV_HEADS, DIM, HIDDEN, MIDDLE = 32, 8, 128, 4096, 14336
BLOCKS, BLOCK_SIZE, LAYERS, SLOTS, TABLE_WIDTH = 16, 64, 4, 64, 128


def calls(batch: int) -> dict[str, Callable[[], object]]:
    """A decode step's launches, by kernel."""
    import torch
    from chiron_kernels.gpu.activation import gated_activation
    from chiron_kernels.gpu.decode_attention import decode_attention
    from chiron_kernels.gpu.decode_splits import decode_splits
    from chiron_kernels.gpu.launch import Launch
    from chiron_kernels.gpu.norm import add_rms_norm
    from chiron_kernels.gpu.rope_kv import rope_kv_write

    Launch.run = lambda self: None  # type: ignore[method-assign]
    half = {"dtype": torch.bfloat16}
    layer = BLOCK_SIZE * 2 * KV_HEADS * DIM
    pool = torch.zeros(BLOCKS, LAYERS * layer, **half)
    kv = pool[:, :layer].unflatten(1, (BLOCK_SIZE, 2, KV_HEADS, DIM))
    qkv = torch.zeros(batch, (HEADS + 2 * KV_HEADS) * DIM, **half)
    angle = torch.zeros(batch, 1, DIM, **half)
    places = torch.zeros(batch, dtype=torch.int64)
    hidden, weight = torch.zeros(batch, HIDDEN, **half), torch.zeros(HIDDEN, **half)
    gate_up = torch.zeros(batch, 2 * MIDDLE, **half)
    tables = torch.zeros(SLOTS, TABLE_WIDTH, dtype=torch.int64)
    splits = decode_splits(places, kv, tables)
    q = torch.zeros(batch, HEADS, DIM, **half)
    out = torch.empty_like(q)
    return {
        "decode_attention": lambda: decode_attention(q, kv, tables, places, places, splits, 0.1, out=out),
        "rope_kv_write": lambda: rope_kv_write(qkv, angle, angle, kv, places, places, HEADS, KV_HEADS),
        "add_rms_norm": lambda: add_rms_norm(hidden, hidden, weight, 1e-5),
        "gated_activation": lambda: gated_activation(gate_up, "silu"),
    }


def time_here(batch: int) -> dict[str, float]:
    """Microseconds of a call, the least of REPEATS times CALLS."""
    found = {}
    for name, call in calls(batch).items():
        best = float("inf")
        for _ in range(REPEATS):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best = min(best, time.perf_counter() - start)
        found[name] = best / CALLS * 1e6
    return found


def time_checkout(folder: Path, batch: int) -> dict[str, float]:
    """The same with another checkout's kernels, in a process of its own."""
    # Interpreted, the kernels can be defined where there is no GPU.
    paths = os.pathsep.join((str(folder), str(folder / "kernels")))
    result = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--once", "--batch", str(batch)],
        env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    times: dict[str, float] = json.loads(result.stdout)
    return times


def least(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: min(times[name] for times in rounds) for name in rounds[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--beside", type=Path, metavar="DIR", help="a checkout to compare with")
    parser.add_argument("--batch", type=int, default=8, help="rows of the decode step")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each checkout, in turns")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(time_here(arguments.batch)))
        return 0
    folders = [HERE] if arguments.beside is None else [HERE, arguments.beside.resolve()]
    rounds: dict[Path, list[dict[str, float]]] = {folder: [] for folder in folders}
    for _ in range(arguments.rounds):
        for folder in folders:
            rounds[folder].append(time_checkout(folder, arguments.batch))
    best = {folder: least(rounds[folder]) for folder in folders}
    report: dict[str, dict[str, float]] = {
        "microseconds": {name: round(time, 1) for name, time in best[HERE].items()}
    }
    for other in folders[1:]:
        report["beside"] = {name: round(time, 1) for name, time in best[other].items()}
        report["ratio"] = {name: round(best[other][name] / time, 2) for name, time in best[HERE].items()}
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
