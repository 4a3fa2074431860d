"""What every trace must satisfy. All that is wrong is told at once, with counts and places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .columns import Floats

MAX_TOKENS = 2**31 - 1
_SHOWN = 3


class TraceError(ValueError):
    """A trace that cannot be replayed. The message names the source and counts the rows."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where rows came from: the number of each within `source`, in units of `unit`."""

    source: str
    numbers: NDArray[np.int64]
    unit: str = "line"

    @classmethod
    def rows(cls, source: str, count: int) -> Places:
        return cls(source, np.arange(1, count + 1), "row")

    def tell(self, wrong: NDArray[np.bool_], what: str, right: str, values: object = None) -> str:
        """One line: how many rows are wrong, the first of them, and what would be right."""
        found = np.flatnonzero(wrong)
        shown = [self._show(int(row), values) for row in found[:_SHOWN]]
        more = ", ..." if len(found) > _SHOWN else ""
        have = "has" if len(found) == 1 else "have"
        return (
            f"{len(found):,} of {len(self.numbers):,} rows {have} {what} ({', '.join(shown)}{more}); {right}"
        )

    def _show(self, row: int, values: object) -> str:
        place = f"{self.unit} {self.numbers[row]}"
        if values is None:
            return place
        text = str(values[row])  # type: ignore[index]
        return f"{place}: {text if len(text) <= 40 else text[:37] + '...'}"


def refuse(source: str, problems: list[str]) -> None:
    """Raises TraceError if there is any problem."""
    if not problems:
        return
    if len(problems) == 1:
        raise TraceError(f"{source}: {problems[0]}")
    raise TraceError(f"{source}:\n" + "\n".join(f"  - {problem}" for problem in problems))


def check_rows(places: Places, arrival_s: Floats, prompt_tokens: Floats, output_tokens: Floats) -> None:
    """Columns as floats, so that what is no number (NaN) or no whole number is told, too.

    Raises TraceError when there are no rows, or any arrival is not finite, negative or earlier than
    the one before it, or any length is not a whole number from 1 to 2**31 - 1.
    """
    if not len(arrival_s):
        raise TraceError(f"{places.source}: 0 rows; a trace holds at least one request")
    problems = arrival_problems(places, arrival_s)
    problems += length_problems(places, prompt_tokens, "prompt")
    problems += length_problems(places, output_tokens, "output")
    refuse(places.source, problems)


def arrival_problems(places: Places, arrival_s: Floats) -> list[str]:
    problems = []
    unfit = ~np.isfinite(arrival_s)
    if unfit.any():
        problems.append(places.tell(unfit, "an arrival that is not finite", "give seconds", arrival_s))
    negative = arrival_s < 0
    if negative.any():
        right = "seconds count from the start of the trace"
        problems.append(places.tell(negative, "a negative arrival", right, arrival_s))
    early = np.concatenate(([False], arrival_s[1:] < arrival_s[:-1]))
    if early.any():
        right = "sort the rows by arrival"
        problems.append(places.tell(early, "an arrival before that of the row above", right, arrival_s))
    return problems


def length_problems(places: Places, tokens: Floats, which: str) -> list[str]:
    problems = []
    none = tokens == 0
    if none.any():
        problems.append(places.tell(none, f"a zero-length {which}", "at least 1 token is needed"))
    with np.errstate(invalid="ignore"):
        odd = ~((tokens >= 0) & (tokens <= MAX_TOKENS) & (np.floor(tokens) == tokens))
    if odd.any():
        right = f"give a whole number of tokens from 1 to {MAX_TOKENS}"
        problems.append(places.tell(odd, f"no valid {which} length", right, tokens))
    return problems
