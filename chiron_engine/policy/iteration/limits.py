"""The two knobs of a running engine. Capacity is fixed; limits move below it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Shrink = Literal["drain", "preempt"]


@dataclass(frozen=True, slots=True)
class Limits:
    """max_running: requests that may hold a slot. token_budget: tokens of one step, decodes and
    prompt chunks together (a decode is never held back: when decodes alone exceed the budget,
    prompts wait). shrink: when max_running falls below the number running, `drain` lets them
    finish, `preempt` evicts batch requests at once; interactive ones always finish."""

    max_running: int
    token_budget: int
    shrink: Shrink = "drain"

    def __post_init__(self) -> None:
        if self.max_running < 1:
            raise ValueError(f"max_running is {self.max_running}; it must be at least 1")
        if self.token_budget < self.max_running:
            raise ValueError(
                f"token_budget is {self.token_budget}; it must be at least max_running "
                f"({self.max_running}), one token for each running request"
            )
        if self.shrink not in get_args(Shrink):
            raise ValueError(f"shrink is {self.shrink!r}; it must be one of {', '.join(get_args(Shrink))}")
