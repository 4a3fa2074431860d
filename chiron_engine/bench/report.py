"""What a person reads of a run against a server: a row for each class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from chiron_engine.sim.report import number, pair, percent, print_rows


def print_bench(summary: Mapping[str, Any], file: TextIO) -> None:
    """As wide as the terminal, or `sim.report.WIDTH` where there is none."""
    wall_s = summary["wall_s"]
    print_rows([_cells(name, figures, wall_s) for name, figures in summary["classes"].items()], file)
    for line in notes(summary):
        print(line, file=file)


def _cells(name: str, figures: Mapping[str, Any], wall_s: float) -> dict[str, str]:
    return {
        "class": name,
        "requests": f"{figures['requests']:,}",
        "in\nSLO %": percent(figures["slo_attainment"]),
        "TTFT s\np50 / p99": pair(figures["ttft_s"], ".3f"),
        "ITL ms\np50 / p99": pair(figures["itl_ms"], ".1f"),
        "end to end s\np50 / p99": pair(figures["e2e_s"], ".2f"),
        "rejected": str(figures["rejected"]),
        "lost": str(figures["lost"]),
        "req/s": number(figures["throughput_rps"], ".2f"),
        "in SLO\nreq/s": number(figures["goodput_rps"], ".2f"),
        "output\ntokens/s": number(figures["output_tokens"] / max(wall_s, 1e-9), ".1f"),
    }


def notes(summary: Mapping[str, Any]) -> list[str]:
    lag, clipped = summary["lag_ms"], summary["clipped"]
    lines = [
        f"{summary['wall_s']:.1f} s; sent {lag['p50']:.1f} ms late in the median, {lag['p99']:.1f} ms at"
        f" p99, {lag['max']:.1f} ms at most; the generator took {summary['client_cpu_s']:.1f} s of CPU"
    ]
    lines += [f"{count:,} x {error}" for error, count in summary["errors"].items()]
    if summary["stopped"]:
        lines.append(f"{summary['stopped']:,} requests were stopped before their end, and count as missed")
    if clipped["prompts"] or clipped["outputs"]:
        lines.append(f"cut to the context: {clipped['prompts']:,} prompts, {clipped['outputs']:,} outputs")
    return lines
