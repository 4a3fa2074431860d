"""One figure of a run over time: TTFT, ITL and what was in flight, beside the objectives."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chiron_engine.policy.iteration.request import SloClass
from chiron_engine.sim.attainment import rows
from chiron_engine.sim.plot import check_plot_path
from chiron_engine.sim.workload import Stream

from .measured import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOWS = 120
COLORS = {SloClass.INTERACTIVE: "#1f5fa8", SloClass.BATCH: "#e0a458"}
Floats = NDArray[np.float64]


def plot_bench(measured: Measured, path: Path, *, title: str) -> None:
    """Write the figure to `path`; its suffix decides the format. Raises ValueError for a path that
    `check_plot_path` refuses."""
    check_plot_path(path)
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "chiron", "svg.fonttype": "none", "font.size": 8}):
        _figure(measured, title).savefig(path, dpi=130)


def _figure(measured: Measured, title: str) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no display and no global state

    figure = Figure(figsize=(8.0, 7.5), layout="constrained")
    first, second, third = figure.subplots(3, 1, sharex=True)
    _draw_ttft(first, measured)
    _draw_itl(second, measured)
    _draw_in_flight(third, measured)
    for axes in (first, second, third):
        axes.grid(alpha=0.25, linewidth=0.5)
        _legend(axes)
    third.set_xlabel("time (s)")
    third.set_xlim(0, max(measured.result.end_s, 1e-3))
    figure.suptitle(title, fontsize=8, color="#444444")
    return figure


def _legend(axes: Axes) -> None:
    """Above the panel, where it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=len(handles),
        columnspacing=1.0,
        frameon=False,
    )


def _draw_ttft(axes: Axes, measured: Measured) -> None:
    for stream in measured.result.workload.streams:
        sent_s = np.asarray(stream.trace.arrival_s)
        ttft_s = rows(measured.result.requests.first_token_s, stream) - sent_s
        _draw_quantiles(axes, sent_s, ttft_s, measured.result.end_s, stream)
    interactive = measured.result.workload.interactive
    if interactive:
        _draw_objective(axes, interactive.slo.ttft_s)
    axes.set_yscale("log")
    axes.set_ylabel("TTFT (s), by when sent")


def _draw_itl(axes: Axes, measured: Measured) -> None:
    for stream in measured.result.workload.streams:
        gaps = measured.gaps[stream.slo_class]
        _draw_quantiles(axes, gaps.at_s, gaps.seconds * 1e3, measured.result.end_s, stream)
    interactive = measured.result.workload.interactive
    if interactive:
        _draw_objective(axes, interactive.slo.itl_s * 1e3)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ITL (ms)")


def _draw_quantiles(axes: Axes, at_s: Floats, values: Floats, end_s: float, stream: Stream) -> None:
    name, color = stream.slo_class.name.lower(), COLORS[stream.slo_class]
    edges, medians, tails = window_quantiles(at_s, values, end_s)
    axes.stairs(medians, edges, color=color, linewidth=1.2, label=f"{name} p50", baseline=None)
    axes.stairs(tails, edges, color=color, linewidth=0.8, alpha=0.6, label=f"{name} p99", baseline=None)


def _draw_objective(axes: Axes, value: float) -> None:
    axes.axhline(value, color="#c0392b", linestyle="--", linewidth=0.8, label="interactive SLO")


def _draw_in_flight(axes: Axes, measured: Measured) -> None:
    end_s = measured.result.end_s
    for stream in measured.result.workload.streams:
        name, color = stream.slo_class.name.lower(), COLORS[stream.slo_class]
        columns = measured.result.requests
        ended_s = rows(measured.ended_s, stream)
        spans = (
            ("in flight", np.asarray(stream.trace.arrival_s), ended_s, 0.5),
            ("with tokens", rows(columns.first_token_s, stream), ended_s, 1.0),
        )
        for label, begin, end, alpha in spans:
            times, counts = open_at(begin, end, end_s)
            axes.step(times, counts, where="post", color=color, alpha=alpha, label=f"{name} {label}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("requests")


def window_quantiles(
    at_s: Floats, values: Floats, end_s: float, windows: int = WINDOWS
) -> tuple[Floats, Floats, Floats]:
    """Edges of equal windows from 0 to end_s, median and p99 of each; NaN where nothing is."""
    edges = np.linspace(0.0, max(end_s, 1e-3), windows + 1)
    medians, tails = np.full(windows, np.nan), np.full(windows, np.nan)
    known = ~np.isnan(values)
    window = np.clip(np.searchsorted(edges, at_s[known], side="right") - 1, 0, windows - 1)
    order = np.argsort(window, kind="stable")
    ordered, starts = values[known][order], np.searchsorted(window[order], np.arange(windows + 1))
    for index, (begin, end) in enumerate(pairwise(starts)):
        if end > begin:
            medians[index], tails[index] = np.quantile(ordered[begin:end], (0.5, 0.99))
    return edges, medians, tails


def open_at(begin: Floats, end: Floats, end_s: float) -> tuple[Floats, Floats]:
    """How many spans are open from each time on. Those without a begin never open; those without an
    end are open to end_s."""
    known = ~np.isnan(begin)
    begin, end = begin[known], np.where(np.isnan(end), end_s, end)[known]
    times = np.concatenate(([0.0], begin, end))
    changes = np.concatenate(([0.0], np.ones(len(begin)), -np.ones(len(end))))
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(changes[order])
