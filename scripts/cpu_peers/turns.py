"""Engines on the same load by turns: a pass of each, then the next pass of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from scripts.cpu_peers.machine import busy_cpu_s
from scripts.cpu_peers.worker import Pass, WorkerError

WARM_UP_TOKENS = 8

Say = Callable[[str], None]
Prompts = Callable[[int, int], list[list[int]]]  # requests, seed


class Runner(Protocol):
    """What `Worker` is to the loop."""

    def run(self, prompts: list[list[int]], output_tokens: int) -> Pass: ...
    def cpu_s(self) -> float: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Contestant:
    """One engine of the comparison. error: why it is no longer in it."""

    name: str
    runner: Runner | None
    error: str | None = None
    passes: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def rates(self) -> dict[int, list[float]]:
        """Output tokens/s of each pass, by requests at once."""
        return {
            requests: [record["output_tokens_per_s"] for record in records]
            for requests, records in self.passes.items()
        }

    def fail(self, error: Exception | str) -> None:
        self.error = str(error)
        self.close()

    def close(self) -> None:
        if self.runner is not None:
            self.runner.close()
            self.runner = None


def measure_load(
    contestants: Sequence[Contestant],
    requests: int,
    passes: int,
    output_tokens: int,
    prompts: Prompts,
    say: Say,
) -> None:
    """Append `passes` passes of so many requests at once to every contestant that stays in.

    A short pass comes before, which is not counted. Every pass has prompts of its own, the same for
    all: seeds go from `requests * 1000` up.
    """
    seed = requests * 1000
    for contestant in contestants:
        _take_turn(contestant, (), prompts(requests, seed), min(WARM_UP_TOKENS, output_tokens))
    for number in range(1, passes + 1):
        asked = prompts(requests, seed + number)
        expected: list[list[int]] = []
        for contestant in contestants:
            others = [other for other in contestants if other is not contestant]
            taken = _take_turn(contestant, others, asked, output_tokens)
            if taken is None:
                continue
            outputs, record = taken
            expected = expected or outputs
            record["first_tokens_as_first_engine"] = agreement(outputs, expected)
            contestant.passes.setdefault(requests, []).append(record)
            say(f"{requests} requests, pass {number}: {contestant.name} {record['output_tokens_per_s']:.1f}")


def _take_turn(
    contestant: Contestant, others: Sequence[Contestant], prompts: list[list[int]], output_tokens: int
) -> tuple[list[list[int]], dict[str, Any]] | None:
    """A pass, and what is kept of it. None where the contestant is out, or falls out now."""
    if contestant.runner is None:
        return None
    runner = contestant.runner
    load_average = os.getloadavg()[0]
    waiting_s, own_s, busy_s = _cpu_s(others), runner.cpu_s(), busy_cpu_s()
    try:
        done = runner.run(prompts, output_tokens)
    except WorkerError as error:
        contestant.fail(error)
        return None
    own_s, busy_s = runner.cpu_s() - own_s, busy_cpu_s() - busy_s
    return done.outputs, {
        "output_tokens_per_s": done.output_tokens_per_s,
        "seconds": done.seconds,
        "cpu_s": own_s,
        "waiting_engines_cpu_s": _cpu_s(others) - waiting_s,
        "other_processes_cpu_s": max(busy_s - own_s, 0.0),
        "load_average_before": load_average,
    }


def _cpu_s(contestants: Sequence[Contestant]) -> float:
    return sum(contestant.runner.cpu_s() for contestant in contestants if contestant.runner is not None)


def agreement(outputs: list[list[int]], expected: list[list[int]]) -> float:
    """Share of requests whose first token is the same: near 1 where it is the same model. Later ones
    drift apart wherever engines round differently."""
    same = sum(ours[0] == theirs[0] for ours, theirs in zip(outputs, expected, strict=True))
    return same / len(outputs)
