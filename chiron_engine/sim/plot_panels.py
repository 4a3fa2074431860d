"""The panels of the figure of a run. Each draws the samples of one run into one pair of axes, and
returns the axes on its right-hand side if it has some. Limits of axes are set where all runs are
known: panels of one row share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .run_result import FleetSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ATTAINMENT_TARGET = 0.99
ATTAINMENT_WINDOWS = 60
ROLE_COLORS = {
    "interactive": "#1f5fa8",
    "mixed": "#7fb2e5",
    "batch": "#e0a458",
    "loading": "#d4d4d4",
    "draining": "#a3a3a3",
}
DEMAND, TARGET, LIMIT, RUNNING = "#c0392b", "#000000", "#000000", "#1f5fa8"
Times = Sequence[float]
Samples = Sequence[FleetSample]
Panel = Callable[["Axes", Times, Samples], "Axes | None"]


class Windows(NamedTuple):
    """Interactive requests that ended, by window of equal length: its end in seconds, how many
    ended in it and how many of these attained their SLO."""

    end_s: list[float]
    ended: list[int]
    attained: list[int]


def attainment_windows(samples: Samples, windows: int = ATTAINMENT_WINDOWS) -> Windows:
    """`samples` in order of time, at least one; windows run from 0 to the last of them."""
    windows = min(windows, len(samples))
    width = samples[-1].time_s / windows
    ended, attained = [0] * windows, [0] * windows
    for sample in samples:
        index = min(int(sample.time_s / width), windows - 1) if width else 0
        ended[index] += sample.ended
        attained[index] += sample.attained
    return Windows([width * (index + 1) for index in range(windows)], ended, attained)


def draw_instances(axes: Axes, times: Times, samples: Samples) -> None:
    """Ready instances by role, stacked, under what is loading and draining; demand D and the targets."""
    gauges = [sample.gauges for sample in samples]
    bottom = [0.0] * len(samples)
    for role, color in ROLE_COLORS.items():
        counts = [getattr(gauge, role) for gauge in gauges]
        if any(counts):
            top = [below + count for below, count in zip(bottom, counts, strict=True)]
            axes.fill_between(times, bottom, top, step="post", color=color, linewidth=0, label=role)
            bottom = top
    axes.step(times, [gauge.busy for gauge in gauges], where="post", color=DEMAND, linewidth=1)
    axes.lines[-1].set_label("demand D")
    targets = [gauge.target for gauge in gauges]
    axes.step(times, targets, where="post", color=TARGET, linewidth=0.8, label="target N*")
    if any(gauge.batch_target for gauge in gauges):
        both = [gauge.target + gauge.batch_target for gauge in gauges]
        axes.step(times, both, where="post", color=TARGET, linewidth=0.8, linestyle=":")
        axes.lines[-1].set_label("target with batch")
    axes.set_ylabel("instances")
    axes.locator_params(axis="y", integer=True)


def draw_limits(axes: Axes, times: Times, samples: Samples) -> None:
    """What the local autoscalers allow, beside what runs. Logarithmic: at low load a limit is far
    above what runs."""
    limits = [sample.mean_limit for sample in samples]
    running = [sample.mean_running for sample in samples]
    axes.set_yscale("symlog", linthresh=1.0)
    axes.step(times, limits, where="post", color=LIMIT, linewidth=0.8, label="limit (mean)")
    axes.step(times, running, where="post", color=RUNNING, linewidth=1, label="running (mean)")
    axes.set_ylabel("requests per\ninstance (log)")


def draw_backpressures(axes: Axes, times: Times, samples: Samples) -> Axes | None:
    """Ratios on the left; BBP, which counts groups, on the right."""
    gauges = [sample.gauges for sample in samples]
    lines = (
        ("IBP", [gauge.interactive_backpressure for gauge in gauges], "#1f5fa8", "-"),
        ("Theta", [gauge.theta for gauge in gauges], "#000000", "--"),
        ("LBP (mean)", [sample.latency_backpressure for sample in samples], "#3a9d5d", "-"),
    )
    for label, values, color, style in lines:
        axes.step(times, values, where="post", color=color, linestyle=style, linewidth=0.9, label=label)
    axes.set_ylabel("backpressure")
    late = [gauge.batch_backpressure for gauge in gauges]
    if not any(late):
        return None
    right = axes.twinx()
    right.step(times, late, where="post", color="#e0a458", linewidth=0.9, label="BBP (right)")
    right.set_ylabel("late groups")
    return right


def draw_waiting(axes: Axes, times: Times, samples: Samples) -> Axes | None:
    """Requests that the fleet holds: interactive on the left, the batch queue on the right."""
    gauges = [sample.gauges for sample in samples]
    held = [gauge.held_interactive for gauge in gauges]
    axes.step(times, held, where="post", color="#1f5fa8", linewidth=1, label="interactive held")
    axes.set_ylabel("requests held")
    queued = [gauge.queued_batch for gauge in gauges]
    if not any(queued):
        return None
    right = axes.twinx()
    right.step(times, queued, where="post", color="#e0a458", linewidth=1, label="batch queued (right)")
    right.set_ylabel("requests queued")
    return right


def draw_attainment(axes: Axes, times: Times, samples: Samples) -> None:
    """Share of the interactive requests that ended within their SLO, by window; windows in which
    none ended stay empty."""
    windows = attainment_windows(samples)
    shares = [
        100 * good / all_ended if all_ended else float("nan")
        for good, all_ended in zip(windows.attained, windows.ended, strict=True)
    ]
    per_second = times[-1] / samples[-1].time_s if samples[-1].time_s else 1.0
    edges = [0.0, *(end * per_second for end in windows.end_s)]
    axes.stairs(shares, edges, color="#1f5fa8", linewidth=1.2, label="attained", baseline=None)
    axes.axhline(100 * ATTAINMENT_TARGET, color="#000000", linestyle="--", linewidth=0.7, label="target")
    axes.set_ylabel("interactive requests\nwithin SLO (%)")


PANELS: tuple[Panel, ...] = (draw_instances, draw_limits, draw_backpressures, draw_waiting, draw_attainment)
