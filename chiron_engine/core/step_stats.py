"""Where the statistics of a step go: hooks, a ring with percentiles, a log."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.step_stats import StepStats

__all__ = ["StepHook", "StepLog", "StepRing", "StepStats", "percentile"]

StepHook = Callable[[StepStats], Limits | None]


class StepRing:
    """The last steps, for percentiles. Itself a step hook."""

    def __init__(self, size: int = 2048) -> None:
        self._stats: deque[StepStats] = deque(maxlen=size)

    def __call__(self, stats: StepStats) -> None:
        self._stats.append(stats)

    def __len__(self) -> int:
        return len(self._stats)

    def values(self, field: str) -> list[float]:
        return [getattr(stats, field) for stats in self._stats]

    def percentile(self, field: str, percent: float) -> float:
        """Nearest-rank percentile of a field over the ring; NaN while it is empty."""
        return percentile(self.values(field), percent)


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile; NaN without values. Raises ValueError outside [0, 100]."""
    if not 0 <= percent <= 100:
        raise ValueError(f"percent is {percent}; it must be between 0 and 100")
    if not values:
        return math.nan
    rank = max(1, math.ceil(len(values) * percent / 100))
    return sorted(values)[rank - 1]


class StepLog:
    """Writes one JSON object a line for each step, `first_token_due` null where nothing is due.
    Itself a step hook and a context manager."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "a", encoding="utf-8", buffering=1 << 16)  # noqa: SIM115 - closed by close

    def __call__(self, stats: StepStats) -> None:
        row = asdict(stats)
        if math.isinf(stats.first_token_due):  # JSON has no infinity
            row["first_token_due"] = None
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
