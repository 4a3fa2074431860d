"""One figure of one or several runs over time: a column a run, the same scale along each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, NamedTuple

from .plot_panels import PANELS, Panel
from .run_result import FleetSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
LETTERS_PER_INCH = 15
"""Of the subtitle, in its small print."""


class PlottedRun(NamedTuple):
    """title: names the run, as its policy. samples: one or more, in order of time."""

    title: str
    samples: Sequence[FleetSample]


def check_plot_path(path: Path) -> None:
    """Raises ValueError where no figure can be written, before a run is paid for."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ValueError(f"the plot {str(path)!r} must end in one of {', '.join(PLOT_SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of the plot {str(path)!r} does not exist")
    if path.is_dir():
        raise ValueError(f"the plot {str(path)!r} is a folder; name a file")


def plot_runs(runs: Sequence[PlottedRun], path: Path, *, subtitle: str = "") -> None:
    """Write the figure to `path`; its suffix decides the format. Equal runs give equal bytes.

    Raises ValueError without runs, for a run without samples and for a path that `check_plot_path`
    refuses.
    """
    if not runs:
        raise ValueError("there is no run to plot")
    for run in runs:
        if not run.samples:
            raise ValueError(f"the run {run.title!r} has no samples to plot")
    check_plot_path(path)
    from matplotlib import rc_context

    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "chiron", "svg.fonttype": "none", "font.size": 8}):
        _figure(runs, subtitle).savefig(path, dpi=130, metadata=undated.get(path.suffix.lower()))


def _figure(runs: Sequence[PlottedRun], subtitle: str) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no display and no global state

    end_s = max(run.samples[-1].time_s for run in runs)
    unit, scale = _time_unit(end_s)
    figure = Figure(figsize=(2.0 + 6.0 * len(runs), 2.1 * len(PANELS)), layout="constrained")
    grid = figure.subplots(len(PANELS), len(runs), sharex=True, sharey="row", squeeze=False)
    for axes, panel in zip(grid, PANELS, strict=True):
        _draw_row(list(axes), panel, runs, scale)
    for axes, run in zip(grid[0], runs, strict=True):
        axes.set_title(run.title, fontsize=10, pad=20)
    for axes in grid[-1]:
        axes.set_xlabel(f"simulated time ({unit})")
        axes.set_xlim(0, end_s / scale or 1)
    if subtitle:
        figure.suptitle(_wrapped(subtitle, figure.get_figwidth()), fontsize=8, color="#444444")
    return figure


def _wrapped(text: str, inches: float) -> str:
    """Lines broken where the figure ends."""
    width = int(LETTERS_PER_INCH * inches)
    return "\n".join(part for line in text.splitlines() for part in wrap(line, width))


def _draw_row(row: Sequence[Axes], panel: Panel, runs: Sequence[PlottedRun], scale: float) -> None:
    """One panel of every run. All axes of the row start at 0 and end above the largest value of any."""
    rights = []
    for axes, run in zip(row, runs, strict=True):
        right = panel(axes, [sample.time_s / scale for sample in run.samples], run.samples)
        axes.grid(alpha=0.25, linewidth=0.5)
        _legend(axes, right)
        if right is not None:
            rights.append(right)
    row[0].set_ylim(0, _above(row))
    for right in rights:
        right.set_ylim(0, _above(rights))


def _above(row: Sequence[Axes]) -> float:
    top = max(axes.dataLim.y1 for axes in row)
    logarithmic = row[0].get_yscale() != "linear"
    return max(1.0, top * (1.5 if logarithmic else 1.06))


def _legend(axes: Axes, right: Axes | None) -> None:
    """Above the panel, where it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    if right is not None:
        more, names = right.get_legend_handles_labels()
        handles, labels = handles + more, labels + names
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=len(handles),
        columnspacing=1.0,
        handlelength=1.4,
        frameon=False,
    )


def _time_unit(seconds: float) -> tuple[str, float]:
    if seconds < 300:
        return "s", 1.0
    return ("min", 60.0) if seconds < 4 * 3600 else ("h", 3600.0)
