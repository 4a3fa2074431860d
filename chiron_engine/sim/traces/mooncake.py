"""Traces as Mooncake publishes them, one JSON object a line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from .checks import Places, TraceError, check_rows
from .columns import Floats, arrivals_of, make_trace, take_rows
from .csv_trace import attach_blocks
from .text_table import open_text
from .trace import Trace

BLOCK_TOKENS = 512
FIELDS = ("timestamp", "input_length", "output_length")


def read_mooncake(path: Path, name: str | None = None) -> Trace:
    """Objects with timestamp (milliseconds), input_length, output_length and, in all rows or none,
    hash_ids: one for every 512 tokens of prompt or part of them. Raises TraceError."""
    rows, places = _read_objects(path)
    arrivals, prompts, outputs = (_numbers(rows, field, places) for field in FIELDS)
    arrivals = arrivals / 1000.0
    check_rows(places, arrivals, prompts, outputs)
    trace = make_trace(name or path.name.split(".")[0], arrivals, prompts, outputs)
    with_ids = np.array(["hash_ids" in row for row in rows])
    if not with_ids.any():
        return trace
    wrong = np.array([not _are_ids(row.get("hash_ids")) for row in rows])
    if wrong.any():
        right = "give a list of whole numbers in every row, or leave it out of all"
        raise TraceError(f"{path}: {places.tell(wrong, 'no valid hash_ids', right)}")
    return attach_blocks(trace, [row["hash_ids"] for row in rows], BLOCK_TOKENS, places)


def spread_ticks(trace: Trace, seed: int) -> Trace:
    """Where most arrivals coincide with the one before, they were recorded in ticks: each is then put
    evenly at random between its tick and the next, by the seed. Other traces are returned as they are.
    """
    arrivals = arrivals_of(trace)
    gaps = np.diff(arrivals)
    if len(gaps) < 2 or np.mean(gaps == 0) <= 0.5 or not gaps.any():
        return trace
    tick = float(np.median(gaps[gaps > 0]))
    spread = arrivals + np.random.default_rng(seed).uniform(0.0, tick, len(arrivals))
    order = np.argsort(spread, kind="stable")
    return take_rows(trace, order, spread[order])


def _read_objects(path: Path) -> tuple[list[dict], Places]:
    rows: list[dict] = []
    lines: list[int] = []
    bad: list[int] = []
    with open_text(path) as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            row = _parse(line)
            lines.append(number)
            rows.append(row if row is not None else {})
            if row is None:
                bad.append(len(rows) - 1)
    places = Places(str(path), np.array(lines, dtype=np.int64))
    if not rows:
        raise TraceError(f"{path}: 0 rows; a trace holds at least one request")
    if bad:
        wrong = np.isin(np.arange(len(rows)), bad)
        right = f"give one object a line, with {', '.join(FIELDS)}"
        raise TraceError(f"{path}: {places.tell(wrong, 'no JSON object', right)}")
    return rows, places


def _parse(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _numbers(rows: list[dict], field: str, places: Places) -> Floats:
    missing = np.array([field not in row for row in rows])
    if missing.any():
        right = f"every row needs {', '.join(FIELDS)}"
        raise TraceError(f"{places.source}: {places.tell(missing, f'no {field}', right)}")
    values = [row[field] for row in rows]
    wrong = np.array([not _is_number(value) for value in values])
    if wrong.any():
        right = "give a number"
        raise TraceError(f"{places.source}: {places.tell(wrong, f'no number as {field}', right, values)}")
    return np.array(values, dtype=np.float64)


def _is_number(value: object) -> bool:
    """A JSON integer may be too large for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or math.log2(abs(value) + 1) < 1000


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(part) is int and abs(part) < 2**63 for part in value)
