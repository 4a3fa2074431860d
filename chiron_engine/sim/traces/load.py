"""Any trace by what it is called on a command line: a packaged name, a file, or a generator's spec."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from chiron_engine.policy.iteration.request import SloClass

from .checks import TraceError
from .columns import make_trace
from .csv_trace import read_csv_lengths, read_csv_trace
from .generate import KINDS, generate_trace, is_generated
from .mooncake import read_mooncake, spread_ticks
from .packaged import LENGTHS, TRACES, packaged_file, read_packaged, trace_names
from .trace import Trace

DEFAULT_SPAN_S = 3600.0


def load_trace(
    spec: str, seed: int = 0, span_s: float = DEFAULT_SPAN_S, slo_class: SloClass | None = None
) -> Trace:
    """A packaged trace (`trace_names`), the path of a CSV (ours or Azure's, plain or .gz) or JSON-lines
    file (Mooncake's), or a generator's spec (`generate_trace`).

    Arrivals recorded in coarse ticks are spread within them, by the seed. Packaged lengths without
    arrivals become a trace of every row once, in order, arriving evenly at random over `span_s` seconds: a
    Poisson process given its number. Of a CSV file with a column slo_class the rows of `slo_class` are
    taken, if it is given, so that one file can hold both.

    Raises TraceError that says what is wrong and what would be right.
    """
    if is_generated(spec):
        return generate_trace(spec, seed)
    if spec in TRACES:
        return spread_ticks(read_packaged(spec), seed)
    if spec in LENGTHS:
        return _lay_out(spec, seed, span_s)
    path = Path(spec)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return spread_ticks(read_mooncake(path), seed)
    if path.name.endswith((".csv", ".csv.gz")):
        return spread_ticks(read_csv_trace(path, slo_class=slo_class), seed)
    raise TraceError(
        f"unknown trace {spec!r}; there are {', '.join(trace_names())}, files ending in .csv, .csv.gz, .jsonl"
        f" or .jsonl.gz, and generators {', '.join(f'{kind}:...' for kind in KINDS)}"
    )


def _lay_out(name: str, seed: int, span_s: float) -> Trace:
    prompts, outputs = read_csv_lengths(packaged_file(name))
    arrivals = np.sort(np.random.default_rng(seed).uniform(0.0, span_s, len(prompts)))
    return make_trace(name, arrivals, prompts, outputs)
