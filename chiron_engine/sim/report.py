"""What a person reads of one or several runs: a table with a row each, and lines on what was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

Summary = Mapping[str, Any]
ABSENT = "-"
WIDTH = 200


def number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def percent(share: float | None) -> str:
    """Rounded down: what misses a target by little must not read as meeting it."""
    return ABSENT if share is None else f"{int(share * 10_000 + 1e-6) / 100:.2f}"


def pair(values: Mapping[str, float | None] | None, form: str) -> str:
    if not values:
        return ABSENT
    return f"{number(values.get('p50'), form)} / {number(values.get('p99'), form)}"


def _over_bound(summary: Summary) -> str:
    bound = summary.get("lower_bound_gpu_hours")
    return f"{summary['gpu_hours'] / bound:.2f}" if bound else ABSENT


def cells(summary: Summary) -> dict[str, str]:
    """One row of the table, by its headings."""
    attained = summary["slo_attainment"]
    return {
        "policy": summary["policy"],
        "interactive\nin SLO %": percent(attained.get("interactive")),
        "batch\nin SLO %": percent(attained.get("batch")),
        "TTFT s\np50 / p99": pair(summary["ttft_s"], ".3f"),
        "ITL ms\np50 / p99": pair(summary["itl_ms"], ".1f"),
        "GPU-\nhours": number(summary["gpu_hours"], ".2f"),
        "x\nbound": _over_bound(summary),
        "peak in-\nstances": str(summary["peak_instances"]),
        "scaling\nactions": str(summary["scaling_actions"]),
        "preemp-\ntions": str(summary["preemptions"]),
        "req/s": number(summary["throughput_rps"], ".2f"),
        "wall\ns": number(summary["wall_s"], ".1f"),
    }


def print_table(summaries: Sequence[Summary], file: TextIO, *, title: str = "") -> None:
    """A row for each run. As wide as the terminal, or `WIDTH` where there is none."""
    print_rows([cells(summary) for summary in summaries], file, title=title)


def print_rows(rows: Sequence[Mapping[str, str]], file: TextIO, *, title: str = "") -> None:
    """A table of cells by heading; the first column is text, the others are figures. A row may lack
    a column that others have."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", vertical="bottom", overflow="fold")
    for row in rows:
        table.add_row(*(row.get(heading, "") for heading in headings))
    width = None if file.isatty() else WIDTH
    Console(file=file, width=width, highlight=False, markup=False).print(table)
