"""Block tables over two tiers: what is found, taken, filled, saved and given back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import BlockPool, chain_key, private_key, root_key
from .plan import BlockCopy
from .request import Request


@dataclass(frozen=True, slots=True)
class SwapCosts:
    """Seconds to save and to bring back one block, and to recompute one token instead."""

    copy_out_s: float = 1e-4
    copy_in_s: float = 1e-4
    recompute_s: float = 1e-3


@dataclass(slots=True)
class Placement:
    """Where the KV of a request could come from: blocks found on the device, then on the host,
    then blocks to compute. `free_needed` counts the blocks no longer free once it is placed."""

    device: list[int]
    host: list[int]
    fresh: int
    free_needed: int


class KvTiers:
    """The device pool and the host pool, and the block tables of running requests.

    A request that runs holds `request.blocks` on the device. A request that was preempted holds
    `request.host_blocks`, its saved prefix, until it runs again. A lost host block costs time,
    never correctness: what is found nowhere is recomputed.

    Blocks that no other request could find, because prefixes are not shared or because nobody knows
    the values of their tokens, are not sealed while their request runs: that is all in vain unless
    it is evicted. Token values are unknown where the executor models none, and where the prompt is a
    `range`, which stands for any tokens; keys put into `block_keys` beforehand make those shareable.
    """

    __slots__ = ("_arriving", "_num_owners", "_prefix_caching", "block_size", "costs", "device", "host")

    def __init__(
        self,
        block_size: int,
        num_device_blocks: int,
        num_host_blocks: int,
        costs: SwapCosts,
        prefix_caching: bool,
    ) -> None:
        self.block_size = block_size
        self.device = BlockPool(num_device_blocks)
        self.host = BlockPool(num_host_blocks)
        self.costs = costs
        self._prefix_caching = prefix_caching
        self._arriving: list[int] = []
        self._num_owners = 0

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def place(self, request: Request, known: int) -> Placement:
        """Look up a request with `known` tokens; at least one is left to compute, for its logits, and all
        whose logits are wanted for the log probabilities of its prompt."""
        usable = known - 1
        if request.num_scored < request.num_to_score:
            usable = request.num_scored
        usable //= self.block_size
        keys = request.block_keys
        if len(keys) < usable:
            self.extend_keys(request, usable * self.block_size)
        needed = -(-known // self.block_size)
        if not keys:
            return Placement([], [], needed, needed)
        device = self.device.find(keys, 0, min(usable, len(keys)))
        host = self.host.find(keys, len(device), min(usable, len(keys)))
        missing = needed - len(device)
        revived = self.device.count_cached(device) if device else 0
        return Placement(device, host, missing - len(host), missing + revived)

    def enter(self, request: Request, placement: Placement) -> list[BlockCopy]:
        """Take the blocks of `placement` as the request's table; returns the copies in it needs."""
        found, host = placement.device, placement.host
        if found:
            self.device.acquire(found)
        request.blocks = found + self.device.allocate(len(host) + placement.fresh)
        copies = self._copy_in(request, len(found), host) if host else []
        if request.host_blocks:
            self.host.release(request.host_blocks)
            request.host_blocks = []
        return copies

    def _copy_in(self, request: Request, start: int, host: list[int]) -> list[BlockCopy]:
        """Fill the table from entry `start` on with the content of host blocks."""
        # The sources stay pinned until the plan is complete: a later eviction in the same plan
        # copies out before these copies in are made.
        self.host.acquire(host)
        self._arriving += host
        stop = start + len(host)
        self.device.seal(request.blocks, request.block_keys, start, stop)
        return [BlockCopy(d, h) for d, h in zip(request.blocks[start:stop], host, strict=True)]

    def settle(self) -> None:
        """The plan is complete: later plans run after its copies, so its sources need no pin."""
        if self._arriving:
            self.host.release(self._arriving)
            self._arriving = []

    def grow(self, request: Request, position: int) -> int:
        """Give a table the block that `position`, the first of that block, needs, and seal the one
        before it. Raises OutOfBlocks."""
        (block,) = self.device.allocate(1)
        request.blocks.append(block)
        self.seal(request, position - 1, position)
        return block

    def reserve(self, request: Request, tokens: int, spare: int) -> list[int]:
        """Blocks for guesses: lengthen a table towards so many tokens, as far as `spare` blocks stay free;
        returns those added."""
        wanted = self.blocks_for(tokens) - len(request.blocks)
        blocks = self.device.allocate(max(0, min(wanted, self.device.num_free - spare)))
        request.blocks += blocks
        return blocks

    def settle_draft(self, request: Request, start: int, end: int) -> None:
        """Of a table with blocks reserved for guesses, tokens [start, end) are computed and held: seal
        what they fill, and give back the blocks behind them."""
        self.seal(request, start, end)
        kept = self.blocks_for(end)
        if len(request.blocks) > kept:
            self.device.release(request.blocks[kept:])
            del request.blocks[kept:]

    def seal(self, request: Request, start: int, end: int) -> None:
        """Tokens [start, end) are computed as of this step: make the blocks they fill findable, where
        another request could find them."""
        first, last = start // self.block_size, end // self.block_size
        if first == last:
            return
        keys = request.block_keys
        if len(keys) < last:
            self.extend_keys(request, end)
            last = min(last, len(keys))
        if first < last:
            self.device.seal(request.blocks, keys, first, last)

    def evict(self, request: Request, computed: int) -> list[BlockCopy]:
        """Give up the device blocks of a request with `computed` tokens of KV, having saved the full
        ones on the host where that is cheaper than recomputing; returns the copies out."""
        full = computed // self.block_size
        self._own_keys(request, full)
        if full:
            self.device.seal(request.blocks, request.block_keys, 0, full)
        copies = self._save(request, full)
        self.device.release(request.blocks)
        request.blocks = []
        return copies

    def leave(self, request: Request) -> None:
        """Give up everything the request holds on either tier. Sealed content stays findable."""
        self.device.release(request.blocks)
        request.blocks = []
        if request.host_blocks:
            self.host.release(request.host_blocks)
            request.host_blocks = []

    def _save(self, request: Request, full: int) -> list[BlockCopy]:
        saved = self.host.find(request.block_keys, 0, full)
        self.host.acquire(saved)
        missing = min(full - len(saved), self.host.num_free)
        if missing and not self._is_worth_saving(missing, len(saved) + missing):
            self.host.release(saved)
            return []
        request.host_blocks = table = saved + self.host.allocate(missing)
        self.host.seal(table, request.block_keys, len(saved), len(table))
        return [BlockCopy(request.blocks[index], table[index]) for index in range(len(saved), len(table))]

    def _is_worth_saving(self, out: int, back: int) -> bool:
        costs = self.costs
        return out * costs.copy_out_s + back * costs.copy_in_s < back * self.block_size * costs.recompute_s

    def extend_keys(self, request: Request, tokens: int) -> None:
        """Extend the hash chain over the full blocks of the first `tokens` tokens, as far as their
        values may be shared and are known."""
        if not self._prefix_caching or type(request.prompt_ids) is range or request.key_owner >= 0:
            return
        keys, size = request.block_keys, self.block_size
        stop = tokens // size
        if len(keys) >= stop:
            return
        parent = keys[-1] if keys else root_key(request.cache_salt)
        for index in range(len(keys), stop):
            values = _values(request, index * size, index * size + size)
            if values is None:
                return
            parent = chain_key(parent, values)  # type: ignore[arg-type]  # a chain of hashes so far
            keys.append(parent)

    def _own_keys(self, request: Request, full: int) -> None:
        """Keys for all of the first `full` blocks: where none can be shared, keys of its own. Blocks
        behind one of those are its own as well."""
        keys = request.block_keys
        if len(keys) < full:
            self.extend_keys(request, full * self.block_size)
        if len(keys) >= full:
            return
        if request.key_owner < 0:
            request.key_owner = self._num_owners
            self._num_owners += 1
        owner = request.key_owner
        keys += [private_key(owner, index) for index in range(len(keys), full)]


def _values(request: Request, start: int, end: int) -> Sequence[int] | None:
    """Token values [start, end), or None where the executor models no values."""
    prompt, output = request.prompt_ids, request.output_ids
    length = len(prompt)
    if end <= length:
        return prompt[start:end]
    if end - length > len(output):
        return None
    if start >= length:
        return output[start - length : end - length]
    return [*prompt[start:], *output[: end - length]]
