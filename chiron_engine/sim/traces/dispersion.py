"""How bursty a trace is."""

from __future__ import annotations

import numpy as np

from .columns import arrivals_of
from .trace import Trace

WINDOWS_S = (1, 10, 60)


def index_of_dispersion(trace: Trace, window_s: float) -> float | None:
    """Variance over mean of the arrivals counted in windows of `window_s`: 1 for a Poisson process,
    more for bursts. None where the trace does not span two windows."""
    windows = int(trace.span_s // window_s)
    if windows < 2:
        return None
    places = (arrivals_of(trace) // window_s).astype(np.int64)
    counts = np.bincount(places[places < windows], minlength=windows)
    return float(counts.var() / counts.mean()) if counts.any() else None


def dispersion(trace: Trace) -> dict[str, float | None]:
    """The index over 1, 10 and 60 s."""
    return {f"{window}s": index_of_dispersion(trace, window) for window in WINDOWS_S}
