"""Traces in CSV: our own columns, Azure's, and blocks of prompt beside them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chiron_engine.policy.iteration.request import SloClass

from .checks import Places, TraceError, check_rows, length_problems, refuse
from .columns import Floats, Ints, make_trace
from .prefix_blocks import PrefixBlocks
from .text_table import TextTable, read_header, read_table
from .trace import Trace

OUR_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
CLASS_COLUMN = "slo_class"
LENGTH_COLUMNS = ("prompt_tokens", "output_tokens")
BLOCK_COLUMNS = ("row", "block_hash_ids")


def read_csv_trace(path: Path, name: str | None = None, slo_class: SloClass | None = None) -> Trace:
    """A trace with the columns arrival_s, prompt_tokens, output_tokens, or as Azure publishes them:
    TIMESTAMP, ContextTokens, GeneratedTokens (times then count from the first row). Where our format
    has a column slo_class, too (`interactive` or `batch`), the rows of `slo_class` are taken, if it is
    given. Others are not read. Raises TraceError."""
    header = read_header(path)
    if "TIMESTAMP" in header:
        table = read_table(path, AZURE_COLUMNS)
        arrivals = _seconds_since_first(table)
        prompts, outputs = table.numbers("ContextTokens"), table.numbers("GeneratedTokens")
    else:
        table = _read_ours(path, CLASS_COLUMN in header)
        arrivals, prompts, outputs = (table.numbers(column) for column in OUR_COLUMNS)
    check_rows(table.places, arrivals, prompts, outputs)
    rows = _rows_of_class(table, slo_class)
    return make_trace(name or path.name.split(".")[0], arrivals[rows], prompts[rows], outputs[rows])


def _rows_of_class(table: TextTable, slo_class: SloClass | None) -> NDArray[np.bool_]:
    """All, where the table names no class."""
    if CLASS_COLUMN not in table.columns:
        return np.ones(len(table.lines), dtype=bool)
    names = {known.name.lower(): known for known in SloClass}
    classes = [names.get(cell.strip()) for cell in table.columns[CLASS_COLUMN]]
    unknown = np.array([found is None for found in classes])
    if unknown.any():
        right = f"there are {', '.join(names)}"
        what = table.places.tell(unknown, "an unknown SLO class", right, table.columns[CLASS_COLUMN])
        raise TraceError(f"{table.source}: {what}")
    chosen = np.array([slo_class is None or found is slo_class for found in classes])
    if slo_class is not None and not chosen.any():
        raise TraceError(
            f"{table.source}: none of {len(chosen):,} rows has slo_class {slo_class.name.lower()}"
        )
    return chosen


def read_csv_lengths(path: Path) -> tuple[Ints, Ints]:
    """Prompt and output tokens of a CSV file with or without arrivals. Raises TraceError."""
    if "TIMESTAMP" in read_header(path):
        table = read_table(path, AZURE_COLUMNS)
        prompts, outputs = table.numbers("ContextTokens"), table.numbers("GeneratedTokens")
    else:
        table = read_table(path, LENGTH_COLUMNS)
        prompts, outputs = table.numbers("prompt_tokens"), table.numbers("output_tokens")
    if not len(prompts):
        raise TraceError(f"{path}: 0 rows; at least one pair of lengths is needed")
    places = table.places
    refuse(str(path), length_problems(places, prompts, "prompt") + length_problems(places, outputs, "output"))
    return prompts.astype(np.int64), outputs.astype(np.int64)


def with_blocks(trace: Trace, path: Path, block_tokens: int) -> Trace:
    """The trace with the prompt blocks of a file of `row,block_hash_ids`: rows count from 0 and each
    appears once, in order; ids are integers set apart by spaces, ceil(prompt / block_tokens) of them.
    Raises TraceError."""
    table = read_table(path, BLOCK_COLUMNS)
    rows = table.numbers("row")
    if not np.array_equal(rows, np.arange(len(trace))):
        raise TraceError(
            f"{path}: {len(rows):,} rows do not count from 0 to {len(trace) - 1:,}, as {trace.name} does"
        )
    try:
        blocks = [[int(part) for part in cell.split()] for cell in table.columns["block_hash_ids"]]
    except ValueError as error:
        raise TraceError(f"{path}: a block id is no whole number ({error})") from error
    return attach_blocks(trace, blocks, block_tokens, table.places)


def attach_blocks(trace: Trace, blocks: list[list[int]], block_tokens: int, places: Places) -> Trace:
    """Raises TraceError if the number of blocks does not fit the prompt."""
    found = np.array([len(row) for row in blocks])
    needed = -(-np.asarray(trace.prompt_tokens, dtype=np.int64) // block_tokens)
    wrong = found != needed
    if wrong.any():
        right = f"one block id per {block_tokens} prompt tokens or part of them is needed"
        refuse(places.source, [places.tell(wrong, "a wrong number of blocks", right, found)])
    table = PrefixBlocks.of(blocks)
    return make_trace(
        trace.name, trace.arrival_s, trace.prompt_tokens, trace.output_tokens, table, block_tokens
    )


def _read_ours(path: Path, with_class: bool) -> TextTable:
    try:
        return read_table(path, (*OUR_COLUMNS, CLASS_COLUMN) if with_class else OUR_COLUMNS)
    except TraceError as error:
        if "no column" not in str(error):
            raise
        azure = ", ".join(AZURE_COLUMNS)
        others = f"(or, as Azure publishes them, {azure})"
        if set(LENGTH_COLUMNS) <= set(read_header(path)):
            others += f"; for lengths alone give a generator, as in poisson:rate=5,lengths={path}"
        raise TraceError(f"{error} {others}") from error


def _seconds_since_first(table: TextTable) -> Floats:
    cells = table.columns["TIMESTAMP"]
    times = [_timestamp(cell) for cell in cells]
    wrong = np.array([time is None for time in times], dtype=bool)
    if wrong.any():
        right = "give a time as 2023-11-16 18:15:46.68"
        refuse(table.source, [table.places.tell(wrong, "no valid TIMESTAMP", right, cells)])
    if not times:
        return np.zeros(0)
    first = times[0]
    try:
        return np.array([(time - first).total_seconds() for time in times])  # type: ignore[operator]
    except TypeError as error:
        raise TraceError(f"{table.source}: only some of the TIMESTAMPs name a time zone") from error


def _timestamp(cell: str) -> datetime | None:
    try:
        return datetime.fromisoformat(cell.strip())
    except ValueError:
        return None
