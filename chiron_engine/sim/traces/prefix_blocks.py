"""Which blocks of prompt each request of a trace consists of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import overload

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class PrefixBlocks(Sequence[Sequence[int]]):
    """Block ids by row, all rows in one array: row r is ids[starts[r] : starts[r + 1]]."""

    __slots__ = ("ids", "starts")

    def __init__(self, ids: NDArray[np.int32], starts: Ints) -> None:
        self.ids = ids
        self.starts = starts

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> PrefixBlocks:
        """Ids may be any integers; they are numbered anew from 0, by value."""
        if isinstance(rows, cls):
            return rows
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        raw = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
        ids = np.unique(raw, return_inverse=True)[1].astype(np.int32)
        return cls(ids, np.concatenate(([0], np.cumsum(lengths))))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, row: int) -> list[int]: ...
    @overload
    def __getitem__(self, row: slice) -> PrefixBlocks: ...
    def __getitem__(self, row: int | slice) -> list[int] | PrefixBlocks:
        if isinstance(row, slice):
            return self.take(np.arange(len(self))[row])
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        found: list[int] = self.ids[self.starts[row] : self.starts[row + 1]].tolist()
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrefixBlocks):
            return NotImplemented
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.ids, other.ids)

    __hash__ = None  # type: ignore[assignment]

    @property
    def row_lengths(self) -> Ints:
        return np.diff(self.starts)

    @property
    def num_ids(self) -> int:
        """One more than the largest id."""
        return int(self.ids.max()) + 1 if len(self.ids) else 0

    def row_of_each(self) -> Ints:
        """For every entry of `ids` the row it is in."""
        return np.repeat(np.arange(len(self)), self.row_lengths)

    def take(self, rows: Ints) -> PrefixBlocks:
        """The named rows, in the order given."""
        lengths = self.row_lengths[rows]
        starts = np.concatenate(([0], np.cumsum(lengths)))
        entries = np.repeat(self.starts[rows] - starts[:-1], lengths) + np.arange(starts[-1])
        return PrefixBlocks(self.ids[entries], starts)

    def copies(self, count: int) -> PrefixBlocks:
        """All rows `count` times over, the ids of each copy its own: copies share no content."""
        shifts = np.repeat(np.arange(count, dtype=np.int64) * self.num_ids, len(self.ids))
        ids = np.tile(self.ids, count) + shifts
        lengths = np.tile(self.row_lengths, count)
        return PrefixBlocks(ids.astype(np.int32), np.concatenate(([0], np.cumsum(lengths))))
