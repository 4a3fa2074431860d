"""Writes step plans by hand: a stand-in for the scheduler whose every choice a test makes."""

from __future__ import annotations

from dataclasses import dataclass, field

from chiron_engine.policy.iteration.plan import (
    NO_DECODES,
    BlockCopy,
    Chunk,
    DecodeBatch,
    Grown,
    Joined,
    StepPlan,
)
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY, SamplingParams
from chiron_engine.runtime.torch_executor import TorchExecutor


@dataclass(eq=False)
class Live:
    """A request in a slot. `computed` counts the tokens whose KV is in `blocks`."""

    request: Request
    slot: int
    tokens: list[int]
    computed: int
    blocks: list[int]
    known_at_join: int
    saved: list[int] = field(default_factory=list)


class PlanDriver:
    """Runs one step at a time on an executor and keeps the tokens of every request."""

    def __init__(self, executor: TorchExecutor) -> None:
        self.executor = executor
        shape = executor.shape
        self.block_size = shape.block_size
        self.free_blocks = list(range(shape.num_device_blocks))
        self.free_host = list(range(shape.num_host_blocks))
        self.free_slots = list(range(shape.max_slots))
        self.live: dict[int, Live] = {}
        self.decode = NO_DECODES
        self.plan = StepPlan(0)
        self.rebuilt_batches = 0
        self.restoring: list[int] = []  # host blocks not free until the plan's copies are made

    def join(
        self,
        request_id: int,
        tokens: list[int],
        sampling: SamplingParams = GREEDY,
        seed: int = 0,
        saved: list[int] | None = None,
    ) -> Live:
        """Take a slot for a request with these known tokens; `saved` host blocks are copied in."""
        request = Request(request_id, tokens, sampling, 1000, seed=seed)
        slot = self.free_slots.pop(0)
        blocks = [self.free_blocks.pop() for _ in range(-(-len(tokens) // self.block_size))]
        saved = saved or []
        self.plan.copies_in += [BlockCopy(d, h) for d, h in zip(blocks, saved, strict=False)]
        live = Live(request, slot, tokens, len(saved) * self.block_size, blocks, len(tokens), saved)
        self.restoring += saved
        self.plan.joined.append(Joined(slot, request, list(tokens), live.computed, list(blocks)))
        self.live[request_id] = live
        return live

    def leave(self, request_id: int) -> Live:
        live = self.live.pop(request_id)
        self.plan.left.append(live.slot)
        self.free_slots.insert(0, live.slot)
        self.free_blocks += live.blocks
        return live

    def evict(self, request_id: int) -> tuple[list[int], list[int]]:
        """Leave, with the full blocks saved as far as the host has room; returns the tokens and the
        host blocks."""
        live = self.leave(request_id)
        full = min(live.computed // self.block_size, len(self.free_host))
        host = [self.free_host.pop() for _ in range(full)]
        self.plan.copies_out += [BlockCopy(d, h) for d, h in zip(live.blocks, host, strict=False)]
        return live.tokens, host

    def step(self, chunks: dict[int, int] | None = None) -> None:
        """One step: a chunk of so many tokens for each request named, a token for every request
        that decodes."""
        plan, self.plan = self.plan, StepPlan(self.plan.step + 1)
        self.free_host, self.restoring = self.free_host + self.restoring, []
        chunked = []
        for request_id, count in (chunks or {}).items():
            live = self.live[request_id]
            end = live.computed + count
            assert end <= live.known_at_join
            plan.chunks.append(Chunk(live.slot, live.computed, count, samples=end == live.known_at_join))
            chunked.append(live)
        decoding = [live for live in self.live.values() if live.computed >= live.known_at_join]
        requests = tuple(live.request for live in decoding)
        if requests != self.decode.requests:
            slots = tuple(live.slot for live in decoding)
            self.decode = DecodeBatch(requests, slots) if requests else NO_DECODES
            self.rebuilt_batches += 1
        plan.decode = self.decode
        for live in decoding:
            if live.computed == len(live.blocks) * self.block_size:
                live.blocks.append(self.free_blocks.pop())
                plan.grown.append(Grown(live.slot, len(live.blocks) - 1, live.blocks[-1]))
        result = self.executor.collect(self.executor.submit(plan))
        self._commit(plan, decoding, chunked, result.tokens or [])

    def _commit(self, plan: StepPlan, decoding: list[Live], chunked: list[Live], tokens: list[int]) -> None:
        sampled = list(decoding)
        for live, chunk in zip(chunked, plan.chunks, strict=True):
            live.computed += chunk.count
            if chunk.samples:
                sampled.append(live)
        for live in decoding:
            live.computed += 1
        for live, token in zip(sampled, tokens, strict=True):
            live.tokens.append(token)


def trip_to_the_host(
    executor: TorchExecutor, first: list[int], second: list[int]
) -> list[tuple[list[int], int]]:
    """Two prompts in mixed steps, the first in two chunks; then it is evicted while the other goes on, and
    resumed. The tokens of both, and how many of them are the prompt's."""
    driver = PlanDriver(executor)
    driver.join(1, list(first))
    other = driver.join(2, list(second))
    driver.step({1: 16, 2: len(second)})
    driver.step({1: len(first) - 16})
    for _ in range(4):
        driver.step()
    tokens, host = driver.evict(1)
    assert host
    driver.step()
    resumed = driver.join(3, tokens, saved=host)
    assert resumed.computed
    driver.step({3: len(tokens) - resumed.computed})
    for _ in range(4):
        driver.step()
    return [(resumed.tokens, len(first)), (other.tokens, len(second))]
