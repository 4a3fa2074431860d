"""A recorded or generated stream of requests, column by column."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trace:
    """Rows sorted by arrival. arrival_s: seconds from the start, array of 'd'. prompt_tokens and
    output_tokens: arrays of 'i', all positive. prefix_blocks: where the trace has them, for each
    row the ids of its prompt's blocks of `prefix_block_tokens` tokens, the last one perhaps
    partial; equal ids mean equal content and equal prefix.
    """

    name: str
    arrival_s: array[float]
    prompt_tokens: array[int]
    output_tokens: array[int]
    prefix_blocks: Sequence[Sequence[int]] | None = None
    prefix_block_tokens: int = 512

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def span_s(self) -> float:
        """Seconds from the start to the last arrival; 0 for an empty trace."""
        return self.arrival_s[-1] if self.arrival_s else 0.0
