"""What came of a case, in the units that goals are set in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.case import Case, Work
from benchmarks.timing import Ceilings, Timing


@dataclass(frozen=True, slots=True)
class PeerResult:
    """seconds: of a call; None, with the reason, where there is no time."""

    name: str
    seconds: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """error: relative, of the first call. other: seconds of the case that the goal is set against, if it was
    timed."""

    case: Case
    work: Work
    timing: Timing
    error: float
    ceilings: Ceilings
    peers: list[PeerResult] = field(default_factory=list)
    other: float | None = None

    @property
    def measures(self) -> dict[str, float]:
        """By unit: time, bytes needed by time, that as a share of the copy, operations by time, for each peer
        its time by ours, and the time of the other case by ours."""
        rate = self.work.bytes / self.timing.median
        ratios = {
            f"x {peer.name}": peer.seconds / self.timing.median
            for peer in self.peers
            if peer.seconds is not None
        }
        measures = {
            "us": self.timing.median * 1e6,
            "GB/s": rate / 1e9,
            "% of copy": 100 * rate / self.ceilings.copy,
            "TFLOP/s": self.work.flops / self.timing.median / 1e12,
            **ratios,
        }
        return measures if self.other is None else {**measures, "x": self.other / self.timing.median}

    @property
    def reached(self) -> bool | None:
        """None where there is no goal, or nothing to hold against it."""
        goal = self.case.goal
        if goal is None or goal.unit not in self.measures:
            return None
        value = self.measures[goal.unit]
        return value <= goal.value if goal.unit == "us" else value >= goal.value

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.case.name,
            "kernels": list(self.case.kernels),
            **asdict(self.work),
            "seconds": asdict(self.timing),
            "measures": self.measures,
            "relative_error": self.error,
            "goal": None if self.case.goal is None else asdict(self.case.goal),
            "reached": self.reached,
            "peers": [
                {**asdict(peer), "ratio": None if peer.seconds is None else peer.seconds / self.timing.median}
                for peer in self.peers
            ],
        }
