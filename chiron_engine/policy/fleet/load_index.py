"""Instances ordered by load, so that packing never scans the fleet."""

from __future__ import annotations

from collections.abc import Iterator

from .instances import Instance

BUCKETS = 128


class LoadIndex:
    """Instances in buckets of quantised load u, and one bit per bucket that holds any.

    An instance in bucket i has (i - 1) / BUCKETS < u <= i / BUCKETS; the last bucket holds those
    over capacity. Inside a bucket the order is that of entering it.
    """

    def __init__(self) -> None:
        self._buckets: list[dict[int, Instance]] = [{} for _ in range(BUCKETS + 2)]
        self._occupied = 0

    def put(self, instance: Instance) -> None:
        """Enter an instance, or move it to where its load belongs now."""
        place = min(-int(-instance.load * BUCKETS // 1), BUCKETS + 1)
        if place == instance.bucket:
            return
        self.discard(instance)
        self._buckets[place][instance.instance_id] = instance
        self._occupied |= 1 << place
        instance.bucket = place

    def discard(self, instance: Instance) -> None:
        place = instance.bucket
        if place < 0:
            return
        bucket = self._buckets[place]
        del bucket[instance.instance_id]
        if not bucket:
            self._occupied &= ~(1 << place)
        instance.bucket = -1

    def fullest_first(self, most_load: float) -> Iterator[Instance]:
        """Instances with u of at most `most_load`, up to quantisation, the fullest first. Not to
        be continued after the index has changed."""
        occupied = self._occupied & ((1 << (int(most_load * BUCKETS) + 1)) - 1)
        while occupied:
            place = occupied.bit_length() - 1
            yield from self._buckets[place].values()
            occupied ^= 1 << place

    def emptiest(self) -> Instance | None:
        if not self._occupied:
            return None
        place = (self._occupied & -self._occupied).bit_length() - 1
        return next(iter(self._buckets[place].values()))
