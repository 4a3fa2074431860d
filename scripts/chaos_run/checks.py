"""Whether what clients got is what an undisturbed run gives: nothing lost, nothing doubled, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from chiron_engine.rpc.v1 import batch_pb2

from .traffic import Batch, Stream
from .workload import Asked

MOST_TIES = 0.01
"""Share of positions at which an output may go another way, the two best tokens being as good."""

Ties = Callable[[Asked, Sequence[int], int], int | None]
"""(request, its tokens, where they first differ) -> positions at which another token was as good; None
where one was not."""


def no_ties(asked: Asked, tokens: Sequence[int], position: int) -> int | None:
    """For tokens that do not depend on arithmetic."""
    return None


@dataclass(slots=True)
class Checks:
    """Counts what is compared; whatever is wrong stands in `violations`, by kind."""

    expected: Sequence[Sequence[int]]
    ties_of: Ties = no_ties
    positions: int = 0
    ties: int = 0
    outputs_with_ties: int = 0
    violations: list[tuple[str, str]] = field(default_factory=list)

    def streams(self, phase: str, streams: Iterable[Stream]) -> None:
        for place, stream in enumerate(streams):
            where = f"{phase}, stream {place} (request {stream.asked.number})"
            self._tokens(where, stream.asked, stream.tokens, is_whole=stream.finished or not stream.cut)
            if stream.error and not (stream.cut and stream.error.startswith("UNAVAILABLE")):
                self.found("failed", where, stream.error)
            elif not stream.error and not stream.finished:
                self.found("unclean end", where, "it ended as if whole, without a finish reason")
            elif stream.finished and stream.completion_tokens != len(stream.tokens):
                told = f"{stream.completion_tokens} counted, {len(stream.tokens)} received"
                self.found("lost", where, told)

    def batch(self, phase: str, batch: Batch, results: Iterable[batch_pb2.LineResult]) -> None:
        seen: set[int] = set()
        for result in results:
            where = f"{phase}, {batch.batch_id} line {result.line_no}"
            if result.line_no in seen:
                self.found("doubled", where, "it has another result")
            seen.add(result.line_no)
            if result.HasField("output"):
                tokens = list(result.output.token_ids)
                self._tokens(where, batch.lines[result.line_no], tokens, is_whole=True)
            else:
                self.found("failed", where, f"{result.error.code}: {result.error.message}")
        for line_no in range(len(batch.lines)):
            if line_no not in seen:
                self.found("lost", f"{phase}, {batch.batch_id} line {line_no}", "it has no result")

    def found(self, kind: str, where: str, what: str) -> None:
        self.violations.append((kind, f"{where}: {what}"))

    def finish(self) -> None:
        """Once all is compared."""
        if self.ties > MOST_TIES * self.positions:
            self.found("ties", "all outputs", f"{self.ties} of {self.positions} positions")

    def _tokens(self, where: str, asked: Asked, tokens: Sequence[int], *, is_whole: bool) -> None:
        expected = self.expected[asked.number]
        self.positions += len(tokens)
        if len(tokens) > len(expected):
            self.found("doubled", where, f"{len(tokens)} tokens of {len(expected)}")
            return
        if is_whole and len(tokens) < len(expected):
            self.found("lost", where, f"{len(tokens)} tokens of {len(expected)}")
        position = first_difference(expected, tokens)
        if position is None:
            return
        ties = self.ties_of(asked, tokens, position)
        if ties is None:
            self.found(kind_of(expected, tokens, position), where, f"from token {position} on")
        else:
            self.ties += ties
            self.outputs_with_ties += 1


def first_difference(expected: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Where `tokens` are no beginning of `expected`."""
    pairs = zip(expected, tokens, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), None)


def kind_of(expected: Sequence[int], tokens: Sequence[int], position: int) -> str:
    """What made tokens differ from `position` on: some came twice, some are missing, or they are others."""
    rest = tokens[position:]
    for shift in range(1, len(expected)):
        if shift <= position and _go_together(expected[position - shift :], rest):
            return "doubled"
        if _go_together(expected[position + shift :], rest):
            return "lost"
    return "differs"


def _go_together(some: Sequence[int], others: Sequence[int]) -> bool:
    length = min(len(some), len(others))
    return length > 1 and list(some[:length]) == list(others[:length])
