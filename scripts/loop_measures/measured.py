"""What the measures share: their options, and what they say."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from chiron_engine.core.step_stats import percentile
from chiron_engine.sim.report import print_rows


@dataclass(frozen=True, slots=True)
class Options:
    """scale: of times and counts, 1 is the measure as stated. model, dtype: of the real engine. gateways:
    processes that answer clients; 1 is the coordinator's own."""

    scale: float = 1.0
    seed: int = 0
    model: str = "smollm2"
    dtype: str = "float32"
    gateways: int = 1

    def seconds(self, stated: float) -> float:
        return stated * self.scale

    def count(self, stated: int) -> int:
        return max(1, round(stated * self.scale))


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target of a measure: what was asked, what was seen, whether it was met."""

    target: str
    seen: str
    met: bool


@dataclass(slots=True)
class Measured:
    """rows: of the table, of equal columns. notes: what a reader must know of the set-up. figures: for
    JSON. load_average: of one minute, when the measure began and when it ended."""

    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    load_average: list[float] = field(default_factory=lambda: [os.getloadavg()[0]])
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def judge(self, target: str, seen: str, met: bool) -> None:
        self.verdicts.append(Verdict(target, seen, bool(met)))

    def stop_watch(self) -> None:
        self.seconds = time.monotonic() - self.began
        self.load_average.append(os.getloadavg()[0])

    def print(self, name: str, options: Options, out: TextIO) -> None:
        scale = "" if options.scale == 1 else f", scale {options.scale:g}"
        print(f"{name}: seed {options.seed}{scale}, {self.seconds:.0f} s; {self._machine()}", file=out)
        for note in self.notes:
            print(f"  {note}", file=out)
        if self.rows:
            print_rows(self.rows, out)
        for verdict in self.verdicts:
            word = "met   " if verdict.met else "MISSED"
            print(f"{word}  {verdict.target}; seen: {verdict.seen}", file=out)

    def _machine(self) -> str:
        loads = " to ".join(f"{load:.1f}" for load in self.load_average)
        return f"{cores()} cores, load average {loads}"

    def as_json(self, name: str, options: Options) -> dict[str, Any]:
        return {
            "measure": name,
            **asdict(options),
            "seconds": self.seconds,
            "cores": cores(),
            "load_average": self.load_average,
            "notes": self.notes,
            "targets": [asdict(verdict) for verdict in self.verdicts],
            "figures": self.figures,
        }


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def milliseconds(seconds: Sequence[float]) -> str:
    """`p50 / p99`, of times in seconds."""
    return f"{percentile(seconds, 50) * 1e3:.2f} / {percentile(seconds, 99) * 1e3:.2f}"
