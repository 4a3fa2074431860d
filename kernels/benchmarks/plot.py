"""The roofline: operations per second over operations per byte, below what the device can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import CaseResult
from benchmarks.timing import Ceilings

LOWEST_INTENSITY, HIGHEST_INTENSITY = 0.5, 10_000.0


def plot_roofline(results: Sequence[CaseResult], ceilings: Ceilings, title: str, path: Path) -> None:
    """Of the cases that have operations. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ridge = ceilings.product / ceilings.copy
    figure, axes = pyplot.subplots(figsize=(9, 6))
    axes.loglog(
        [LOWEST_INTENSITY, ridge, HIGHEST_INTENSITY],
        [LOWEST_INTENSITY * ceilings.copy / 1e12, ceilings.product / 1e12, ceilings.product / 1e12],
        color="0.4",
        label="measured copy and matrix product",
    )
    for kernel in sorted({"+".join(result.case.kernels) for result in results if result.work.flops}):
        points = [r for r in results if r.work.flops and "+".join(r.case.kernels) == kernel]
        axes.scatter(
            [point.work.flops / point.work.bytes for point in points],
            [point.measures["TFLOP/s"] for point in points],
            s=18,
            label=kernel,
        )
    axes.set(xlabel="operations per byte needed", ylabel="TFLOP/s", title=title)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
