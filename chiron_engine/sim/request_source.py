"""Rows of a workload as requests, each made when it arrives."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from chiron_engine.core.executor import ExecutorShape
from chiron_engine.policy.fleet.messages import FleetRequest
from chiron_engine.policy.iteration.request import Slo, SloClass

from .request_book import LiveRequest
from .workload import Stream, Workload

Arrival = tuple[float, int, Stream, int]


class RequestSource:
    """Yields what the fleet sees of each request and what the simulation alone knows, in order of
    arrival.

    A request may have as many output tokens as the context leaves, or `max_output_tokens`; the
    fleet knows that cap, and not the true length. Raises ValueError for prompts that leave no room
    for a token, and for prefix blocks that the engine's blocks do not divide.
    """

    def __init__(self, workload: Workload, shape: ExecutorShape, max_output_tokens: int | None) -> None:
        self._arrivals = workload.arrivals()
        self._context = shape.max_model_len
        self._block_size = shape.block_size
        self._cap = max_output_tokens if max_output_tokens is not None else shape.max_model_len
        self._conversations = Conversations()
        self._slos = {
            stream.slo_class: Slo(stream.slo_class, stream.slo.ttft_s, stream.slo.itl_s)
            for stream in workload.streams
        }
        self._completion_s = {stream.slo_class: stream.completion_s for stream in workload.streams}
        for stream in workload.streams:
            _refuse_too_long(stream, shape.max_model_len)
            _refuse_odd_blocks(stream, shape.block_size)

    def next_arrival(self) -> Arrival | None:
        return next(self._arrivals, None)

    def make(self, arrival: Arrival) -> tuple[FleetRequest, LiveRequest]:
        when, request_id, stream, row = arrival
        trace = stream.trace
        prompt = trace.prompt_tokens[row]
        cap = min(self._cap, self._context - prompt)
        output = min(trace.output_tokens[row], cap)
        slo = self._slo(stream.slo_class, when)
        keys: Sequence[Hashable] = ()
        prefix = None
        if trace.prefix_blocks is not None:
            blocks = trace.prefix_blocks[row]
            keys = self._block_keys(stream, blocks, prompt)
            prefix = self._conversations.name(stream.first_id, blocks)
        live = LiveRequest(request_id, slo, when, prompt, output, cap, keys)
        return FleetRequest(request_id, slo, when, prompt, cap, prefix), live

    def _slo(self, slo_class: SloClass, arrival: float) -> Slo:
        slo = self._slos[slo_class]
        if slo_class is SloClass.INTERACTIVE:
            return slo
        return Slo(slo_class, slo.ttft_s, slo.itl_s, arrival + self._completion_s[slo_class])

    def _block_keys(self, stream: Stream, blocks: Sequence[int], prompt: int) -> list[Hashable]:
        """A key for each full block of the engine's size in the prompt."""
        per_block = stream.trace.prefix_block_tokens // self._block_size
        keys: list[Hashable] = [
            (stream.first_id, block, part) for block in blocks for part in range(per_block)
        ]
        return keys[: prompt // self._block_size]


class Conversations:
    """Names what requests share: one that repeats blocks of an earlier prompt, beyond the first,
    gets that one's name. The first block is no sign, it may be a system prompt that all have."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, int], int] = {}
        self._count = 0

    def name(self, family: int, blocks: Sequence[int]) -> object:
        """`family` keeps block ids of different traces apart. None for a prompt of one block."""
        names = self._names
        keys = [(family, block) for block in blocks[1:]]
        if not keys:
            return None
        found = None
        for key in keys:
            known = names.get(key)
            if known is None:
                break
            found = known
        if found is None:
            found = self._count
            self._count += 1
        for key in keys:
            names.setdefault(key, found)
        return found


def _refuse_too_long(stream: Stream, max_model_len: int) -> None:
    prompts = np.asarray(stream.trace.prompt_tokens)
    too_long = np.flatnonzero(prompts >= max_model_len)
    if len(too_long):
        row = int(too_long[0])
        raise ValueError(
            f"{len(too_long)} of {len(prompts)} prompts of {stream.trace.name} fit on no instance: row "
            f"{row + 1} has {prompts[row]} tokens, and one request may hold {max_model_len}, output included"
        )


def _refuse_odd_blocks(stream: Stream, block_size: int) -> None:
    trace = stream.trace
    if trace.prefix_blocks is not None and trace.prefix_block_tokens % block_size:
        raise ValueError(
            f"block_size is {block_size}; it must divide the {trace.prefix_block_tokens} tokens of the "
            f"prefix blocks of {trace.name}"
        )
