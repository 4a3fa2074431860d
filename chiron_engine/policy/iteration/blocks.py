"""Blocks of KV cache: who holds them, which content they keep, and which is given away next.

The same class serves the device tier and the host tier, keyed by the same hash chain.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b

BlockKey = Hashable
KEY_BYTES = 16


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free."""


class BlockPool:
    """Reference-counted blocks of one tier.

    Invariant: every block is in exactly one of three places. *Held*: its count is above zero
    (a block table refers to it, or a saved request pins it). *Cached*: its count is zero but it
    is sealed, so its key still finds it until it is given away, least recently released first.
    *Blank*: its count is zero and nothing can find it. Blocks from `len(_count)` on were never used
    and are blank too; the pool's own memory grows as they are.

    A key names the block's tokens and everything before them, so equal keys mean equal KV. When
    two blocks come to hold the same content only the first is findable; tables stay append-only.
    """

    __slots__ = ("_blank", "_cached", "_count", "_found", "_key", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks is {num_blocks}; it must not be negative")
        self.num_blocks = num_blocks
        self._count: list[int] = []
        self._key: list[BlockKey | None] = []
        self._found: dict[BlockKey, int] = {}
        self._blank: list[int] = []
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self._count) + len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each held once. Raises OutOfBlocks and takes none if too few are free."""
        blank = self._blank
        if count > len(blank) and count > self.num_free:
            raise OutOfBlocks(f"{count} blocks asked for, {self.num_free} of {self.num_blocks} free")
        kept = max(0, len(blank) - count)
        taken = blank[kept:]
        del blank[kept:]
        if len(taken) < count:
            self._take_unused(count - len(taken), taken)
        if len(taken) < count:
            self._take_cached(count - len(taken), taken)
        counts = self._count
        for block in taken:
            counts[block] = 1
        return taken

    def _take_unused(self, count: int, taken: list[int]) -> None:
        """Append up to `count` blocks that were never used."""
        start = len(self._count)
        stop = min(start + count, self.num_blocks)
        self._count += [0] * (stop - start)
        self._key += [None] * (stop - start)
        taken += range(start, stop)

    def _take_cached(self, count: int, taken: list[int]) -> None:
        """Append the `count` cached blocks released longest ago, which nothing finds any more."""
        cached, keys, found = self._cached, self._key, self._found
        for _ in range(count):
            block, _ = cached.popitem(last=False)
            key = keys[block]
            assert key is not None  # cached blocks are sealed
            del found[key]
            keys[block] = None
            taken.append(block)

    def find(self, keys: Sequence[BlockKey], start: int = 0, stop: int | None = None) -> list[int]:
        """Blocks of the longest run of findable keys from `start`; changes nothing."""
        blocks: list[int] = []
        found = self._found
        if not found:
            return blocks
        for index in range(start, len(keys) if stop is None else stop):
            block = found.get(keys[index])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_cached(self, blocks: Iterable[int]) -> int:
        """How many of these found blocks nobody holds: acquiring them makes them no longer free."""
        return sum([self._count[block] == 0 for block in blocks])

    def acquire(self, blocks: Iterable[int]) -> None:
        """Hold found blocks once more; a cached one is safe from being given away from here on."""
        for block in blocks:
            if self._count[block] == 0:
                del self._cached[block]
            self._count[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one hold on each block. The last block of a table is given away first: a prefix
        without its tail is still useful, a tail without its prefix is not."""
        counts, keys = self._count, self._key
        for block in reversed(blocks):
            count = counts[block] - 1
            if count < 0:
                raise ValueError(f"block {block} is released more often than it is held")
            counts[block] = count
            if count > 0:
                continue
            if keys[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def seal(self, blocks: Sequence[int], keys: Sequence[BlockKey], start: int, stop: int) -> None:
        """Held blocks [start, stop) of a table are full with the content their keys name; make them
        findable where no other block is."""
        key_of, found = self._key, self._found
        for index in range(start, stop):
            block, key = blocks[index], keys[index]
            if key_of[block] is None and found.setdefault(key, block) == block:
                key_of[block] = key

    def check(self, holds: Iterable[Sequence[int]]) -> None:
        """Verify the invariant against `holds`, every table and pin list. For tests: O(blocks)."""
        used = len(self._count)
        expected = [0] * used
        for table in holds:
            for block in table:
                expected[block] += 1
        if expected != self._count:
            wrong = [b for b in range(used) if expected[b] != self._count[b]]
            raise AssertionError(f"counts differ from the tables at blocks {wrong[:8]}")
        held = {b for b, count in enumerate(self._count) if count}
        places = [held, set(self._blank), set(self._cached)]
        if sum(map(len, places)) != used or set().union(*places) != set(range(used)):
            raise AssertionError("held, blank and cached blocks do not partition the blocks used")
        if len(self._blank) != len(set(self._blank)) or used > self.num_blocks:
            raise AssertionError("a block is blank twice, or there are too many")
        sealed = {b: key for b, key in enumerate(self._key) if key is not None}
        if {key: b for b, key in sealed.items()} != self._found or set(self._cached) - set(sealed):
            raise AssertionError("the key index differs from the sealed blocks")
        if set(self._blank) & set(sealed):
            raise AssertionError("a blank block is sealed")


def chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full block: a 128-bit hash of its tokens and of the key before it."""
    values = tokens if isinstance(tokens, array) else array("I", tokens)
    return blake2b(parent + values.tobytes(), digest_size=KEY_BYTES).digest()


def private_key(owner: int, index: int) -> BlockKey:
    """Key of block `index` whose tokens are unknown or must not be shared: only the request numbered
    `owner` looks for it. Never equal to a hash, nor to the number a trace gives a block."""
    return ("private", owner, index)


def root_key(salt: bytes) -> bytes:
    """Parent of the first block. Requests with different salts never share blocks."""
    return blake2b(salt, digest_size=KEY_BYTES, person=b"chiron root").digest()
