#!/usr/bin/env python3
"""Make packaged profiles from tables of step times.

Reads, in FOLDER, derived_step_base.csv.gz, derived_decode_step.csv.gz, derived_prefill_step.csv.gz
and derived_fits.json (the columns are described in chiron_engine/sim/data/profiles/README.md),
writes one JSON file a configuration under OUT, and reports how near the linear models come.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from chiron_engine.sim.linear_fit import Matrix, fit_costs, fit_envelope, step_features
from chiron_engine.sim.profile_file import read_tables
from chiron_engine.sim.table_step_times import SHORTEST_CONTEXT, TableStepTimes

Key = tuple[str, str, str, int]
Row = dict[str, str]

GPUS = {"h100_sxm": "h100", "a100_sxm": "a100"}
PRECISIONS = {"bfloat16": "bf16", "fp8": "fp8"}
HOST_BYTES_PER_S = {"h100": 50e9, "a100": 25e9}
"""Assumed, for each GPU: what PCIe 5 and PCIe 4 with 16 lanes give to large copies."""
CONTEXT_LENGTH = 131_072
ENVELOPE_SHARE = 0.995
"""Of the highest plane under the points tried: between them the tables sag by up to 0.3 %."""
SOURCE = (
    "Step times derived from the kernel tables of PyPI aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0); "
    "see chiron_engine/sim/data/profiles/README.md"
)


def rows_by_key(path: Path) -> dict[Key, list[Row]]:
    rows = defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows[row["gpu"], row["model"], row["weights"], int(row["tp"])].append(row)
    return rows


def tables(base: list[Row], decode: list[Row], prefill: list[Row]) -> dict[str, object]:
    by_batch: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for row in decode:
        by_batch[int(row["batch"])].append((int(row["ctx"]), float(row["attn_ms"])))
    attention = []
    for batch, points in sorted(by_batch.items()):
        points.sort()
        expected = [SHORTEST_CONTEXT << i for i in range(len(points))]
        if [c for c, _ in points] != expected:
            raise ValueError(f"contexts of batch {batch} are {[c for c, _ in points]}, not {expected}")
        attention.append({"requests": batch, "ms": [ms for _, ms in points]})
    lm_head = {int(row["batch"]): float(row["lm_head_ms"]) for row in decode}
    return {
        "base_ms": sorted([int(r["num_tokens"]), float(r["base_ms"])] for r in base),
        "lm_head_ms": [list(point) for point in sorted(lm_head.items())],
        "decode_attention_ms": {"first_context": SHORTEST_CONTEXT, "rows": attention},
        "prefill_attention_ms": sorted([int(r["prompt_tokens"]), float(r["attn_ms"])] for r in prefill),
    }


def kv_lengths(times: TableStepTimes, requests: int, contexts: list[float]) -> list[int]:
    """KV tokens of `requests` requests: at each context that fits, and where the KV is full."""
    full = min(times.kv_capacity_tokens, requests * times.max_model_len)
    return sorted({int(c) * requests for c in contexts if c * requests <= full} | {full})


def prompt_chunks(times: TableStepTimes) -> list[tuple[int, int]]:
    """(tokens, context at the end) of chunks, of none at first."""
    chunks = [(0, 0)]
    for tokens in [1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192]:
        ends = {16, tokens, 2 * tokens, 4096, 16_384, times.max_model_len}
        chunks += [(tokens, end) for end in sorted(ends) if end <= times.max_model_len]
    return chunks


def step_points(times: TableStepTimes, knots: list[int], contexts: list[float]) -> Iterator[tuple[int, ...]]:
    """Steps over the whole capacity: at every knot of the tables, and where the KV is full."""
    for requests in [0, *(n for n in knots if n <= times.max_slots)]:
        lengths = kv_lengths(times, requests, contexts)
        for tokens, end in prompt_chunks(times):
            # Between knots of the base too: its table is read at the sum of both counts.
            counts = {tokens, *(k - requests for k in knots if tokens and k > requests)}
            for count in sorted(counts):
                if requests + count <= times.max_step_tokens and (requests or count):
                    yield from ((requests, kv_tokens, count, count * end) for kv_tokens in lengths)


def efficient(points: Matrix, times: TableStepTimes) -> Matrix:
    """Weight 1 where the KV is full and prompts come at 0 to 16 tokens for each one produced."""
    requests, kv_tokens, tokens, context = points.T
    full = kv_tokens >= 0.95 * times.kv_capacity_tokens
    usual = (tokens <= 16 * requests) & (context <= 4096 * np.maximum(tokens, 1))
    many = requests >= np.minimum(times.max_slots, times.kv_capacity_tokens / 4096) / 2
    return (full & usual & many).astype(float)


def usual_steps(points: Matrix) -> Matrix:
    """Steps an engine really runs: prompt chunks of up to 2,048 tokens, contexts up to 16k."""
    requests, kv_tokens, tokens, context = points.T
    return (tokens <= 2048) & (context <= 16_384 * tokens) & (kv_tokens <= 16_384 * requests)


def models(fields: dict[str, object], limits: tuple[int, int, int]) -> dict[str, object]:
    """`fit` and `envelope` of a profile, from steps all over its tables."""
    times = TableStepTimes(read_tables(fields), *limits)
    base = [int(tokens) for tokens, _ in fields["base_ms"]]  # type: ignore[attr-defined]
    contexts = [0, 64, *(SHORTEST_CONTEXT * 2 ** (i / 2) for i in range(21))]
    points = np.array(sorted(set(step_points(times, base, contexts))), dtype=float)
    seconds = np.array([times.seconds(*map(int, point)) for point in points])
    features = step_features(*points.T)
    used = usual_steps(points)
    fit = fit_costs(features[used], seconds[used])
    weights = efficient(points, times)
    envelope = fit_envelope(features, ENVELOPE_SHARE * seconds, weights)
    error = np.abs(features[used] @ np.array(list(asdict(fit).values())) / seconds[used] - 1)
    height = features @ np.array(list(asdict(envelope).values())) / seconds
    print(f"  fit off by {error.mean():.1%} in the mean, {error.max():.0%} at most, over usual steps")
    print(f"  envelope at {height[weights > 0].mean():.0%} of efficient steps, {height.max():.1%} at most")
    return {"fit": asdict(fit), "envelope": asdict(envelope)}


def write(path: Path, fields: dict[str, object]) -> None:
    """One line a field: short to read, short to compare."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    parts = [
        rows_by_key(arguments.folder / f"derived_{name}.csv.gz")
        for name in ("step_base", "decode_step", "prefill_step")
    ]
    for config in json.loads((arguments.folder / "derived_fits.json").read_text(encoding="utf-8")):
        key = (config["gpu"], config["model"], config["weights"], config["tp"])
        gpu, tp = GPUS[key[0]], config["tp"]
        name = f"{gpu}/{key[1]}/tp{tp}/{PRECISIONS[key[2]]}"
        print(name)
        measured = tables(*(part[key] for part in parts))
        capacity = config["kv_capacity_tokens"]
        slots = max(row["requests"] for row in measured["decode_attention_ms"]["rows"])  # type: ignore[index]
        length = min(CONTEXT_LENGTH, capacity)
        write(
            arguments.out / f"{name}.json",
            {
                "name": name,
                "kind": "tables",
                "source": SOURCE,
                "gpus": tp,
                "kv_capacity_tokens": capacity,
                "kv_bytes_per_token": config["kv_bytes_per_token"],
                "max_slots": slots,
                "max_step_tokens": measured["base_ms"][-1][0],  # type: ignore[index]
                "max_model_len": length,
                "copy_s_per_kv_token": config["kv_bytes_per_token"] / tp / HOST_BYTES_PER_S[gpu],
                **models(measured, (capacity, slots, length)),
                **measured,
            },
        )


if __name__ == "__main__":
    main()
