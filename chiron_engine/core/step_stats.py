"""What one step did and took, and where that goes: hooks, a ring with percentiles, a log."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from chiron_engine.policy.iteration.limits import Limits


@dataclass(slots=True)
class StepStats:
    """One committed step. Durations and times in seconds, on the engine's clock.

    kv_tokens: sum of the KV lengths that decoding requests attend to. prefill_context: sum over
    prompt chunks of count x KV length at the chunk's end. itl_s: gap since the last commit, the
    inter-token latency of every request that decoded in both steps; itl_interactive and itl_batch
    count them. submit_s: handing the plan over; wait_s: waiting for the result; device_s: what the
    executor says the step took.
    """

    step: int
    time: float
    prefill_tokens: int
    prefill_context: int
    decode_requests: int
    kv_tokens: int
    swap_out_blocks: int
    swap_in_blocks: int
    plan_s: float
    submit_s: float
    wait_s: float
    device_s: float
    commit_s: float
    graph: bool
    running: int
    waiting: int
    free_blocks: int
    finished: int
    preempted: int
    max_running: int
    token_budget: int
    itl_s: float
    itl_interactive: int
    itl_batch: int

    @property
    def host_s(self) -> float:
        """Time the step spent outside the executor."""
        return self.plan_s + self.commit_s


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
    """Writes one JSON object a line for each step. Itself a step hook and a context manager."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "a", encoding="utf-8", buffering=1 << 16)  # noqa: SIM115 - closed by close

    def __call__(self, stats: StepStats) -> None:
        self._file.write(json.dumps(asdict(stats)) + "\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
