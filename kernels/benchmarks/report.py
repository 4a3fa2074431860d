"""The results as JSON and as a page of Markdown; and, without a GPU, what the least times would be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.case import Case
from benchmarks.results import CaseResult
from benchmarks.tables import NOT_COVERED, SWEEPS, sweep_name
from benchmarks.timing import REPLAYS, Ceilings
from scripts.gpu_suite.report import table

NAME = "microbenchmarks"

LARGEST_STEP = 1.25
"""By so much bandwidth may fall from one point of a sweep to the next."""

H100 = Ceilings(copy=3.0e12, product=798e12, to_host=50e9)
"""Of an H100 80 GB, as published: for estimates."""


def write_results(
    facts: Mapping[str, Any],
    ceilings: Ceilings,
    results: Sequence[CaseResult],
    not_run: Mapping[str, str],
    folder: Path,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    page = {
        "device": dict(facts),
        "ceilings": {
            "copy_bytes_per_s": ceilings.copy,
            "bf16_flops_per_s": ceilings.product,
            "to_host_bytes_per_s": ceilings.to_host,
        },
        "cases": [result.as_json() for result in results],
        "not_run": dict(not_run),
        "not_covered": NOT_COVERED,
    }
    (folder / f"{NAME}.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    (folder / f"{NAME}.md").write_text(markdown(facts, ceilings, results, not_run), encoding="utf-8")


def markdown(
    facts: Mapping[str, Any],
    ceilings: Ceilings,
    results: Sequence[CaseResult],
    not_run: Mapping[str, str],
) -> str:
    lines = [
        f"# Kernels on {facts['name']}",
        "",
        f"torch {facts['torch']}, Triton {facts['triton']}. Copy {ceilings.copy / 1e9:,.0f} GB/s read and "
        f"written, bfloat16 product {ceilings.product / 1e12:,.0f} TFLOP/s, to pinned memory "
        f"{ceilings.to_host / 1e9:.1f} GB/s.",
        "",
        f"us: median of {REPLAYS} replays of a CUDA graph, of one call; GB/s: bytes that are needed, by that "
        "time. Beside a peer, or another kernel of ours: its time by ours, so above 1 ours is faster.",
        "",
        *table(("case", "us", "GB/s", "% of copy", "TFLOP/s", "error", "goal", "peers"), _rows(results)),
    ]
    if steps := falling_steps(results):
        lines += ["## Steps down in a sweep", "", *(f"- {step}" for step in steps), ""]
    for title, reasons in (("Not run", not_run), ("Not covered", NOT_COVERED)):
        if reasons:
            lines += [f"## {title}", "", *(f"- {name}: {reason}" for name, reason in reasons.items()), ""]
    return "\n".join(lines)


def falling_steps(results: Sequence[CaseResult]) -> list[str]:
    """Where bandwidth falls by more than LARGEST_STEP from a point of a sweep to the next that was timed."""
    rates = {result.case.name: result.measures["GB/s"] for result in results}
    found = []
    for points in SWEEPS.values():
        timed = [name for name in (sweep_name(*point) for point in points) if name in rates]
        for before, after in pairwise(timed):
            if rates[before] > LARGEST_STEP * rates[after]:
                found.append(f"{before}: {rates[before]:,.0f} GB/s; {after}: {rates[after]:,.0f} GB/s")
    return found


def _rows(results: Sequence[CaseResult]) -> list[tuple[Any, ...]]:
    rows = []
    for result in results:
        measures = result.measures
        rows.append(
            (
                result.case.name,
                f"{measures['us']:,.1f}",
                f"{measures['GB/s']:,.0f}",
                f"{measures['% of copy']:.0f}",
                f"{measures['TFLOP/s']:,.0f}" if result.work.flops else "",
                f"{result.error:.1e}",
                _goal(result),
                _peers(result),
            )
        )
    return rows


def _goal(result: CaseResult) -> str:
    if result.case.goal is None:
        return ""
    if result.reached is None:
        return f"{result.case.goal}: not timed in this run"
    unit = result.case.goal.unit
    value = f" ({result.measures[unit]:.2f})" if unit.startswith("x") else ""
    return f"{result.case.goal}: {'reached' if result.reached else 'missed'}{value}"


def _peers(result: CaseResult) -> str:
    """Times of peers by ours; without one, why."""
    return ", ".join(
        f"{peer.name} ({peer.reason})"
        if peer.seconds is None
        else f"{peer.name} {peer.seconds / result.timing.median:.2f}"
        for peer in result.peers
    )


def estimates(cases: Sequence[Case]) -> str:
    """The least time of each case on an H100."""
    rows = []
    for case in cases:
        work = case.work()
        bound, floor = max(H100.least_seconds(work).items(), key=lambda item: item[1])
        rows.append(
            (
                case.name,
                f"{work.bytes / 1e6:,.1f}",
                f"{work.flops / 1e9:,.1f}",
                f"{floor * 1e6:,.1f}",
                bound,
                case.goal or "",
            )
        )
    lines = [
        "# Least times on an H100: estimates, nothing was measured",
        "",
        f"The largest of bytes at {H100.copy / 1e12:g} TB/s, operations at {H100.product / 1e12:g} TFLOP/s "
        f"and bytes to the host at {H100.to_host / 1e9:g} GB/s.",
        "",
        *table(("case", "MB", "GFLOP", "floor us", "bound by", "goal"), rows),
    ]
    return "\n".join(lines)
