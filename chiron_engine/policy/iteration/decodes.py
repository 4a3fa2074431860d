"""The requests that decode, one token a step each, and what the coming steps will need for them.

Nothing here is touched for a request that goes on decoding: its position follows from the step
number, the block it will need next falls into one of `block_size` buckets, and the step that
yields its last token by length stands in a heap.
"""

from __future__ import annotations

import heapq

from .plan import NO_DECODES, DecodeBatch
from .request import Request, SloClass

FEW = 64


class Decodes:
    """requests: those that decode, in the order they began. context: sum of the KV lengths they
    attend to in the next step to be planned, their own token included."""

    __slots__ = (
        "_batch",
        "_block_size",
        "_growing",
        "_last_steps",
        "_num_interactive",
        "_serial",
        "context",
        "requests",
    )

    def __init__(self, block_size: int) -> None:
        self.requests: dict[Request, None] = {}
        self.context = 0
        self._block_size = block_size
        self._batch: DecodeBatch | None = NO_DECODES
        self._growing: list[dict[Request, None]] = [{} for _ in range(block_size)]
        self._last_steps: list[tuple[int, int, Request]] = []
        self._num_interactive = 0
        self._serial = 0

    def __len__(self) -> int:
        return len(self.requests)

    def __contains__(self, request: object) -> bool:
        return request in self.requests

    def start(self, request: Request, step: int) -> None:
        """It decodes from `step` on; its planned outputs and known tokens are up to date."""
        request.decode_since = step
        self.requests[request] = None
        self._batch = None
        self.context += request.tokens_at(step)
        self._num_interactive += request.slo.slo_class is SloClass.INTERACTIVE
        self._growing[self._bucket(request)][request] = None
        self._serial += 1
        last = step + request.max_tokens - request.num_planned_outputs - 1
        heapq.heappush(self._last_steps, (last, self._serial, request))
        if len(self._last_steps) > 2 * len(self.requests) + FEW:
            self._forget_ended()

    def stop(self, request: Request, step: int) -> None:
        """It does not decode in `step` any more; what the steps before yield is planned output."""
        self.context -= request.tokens_at(step)
        del self.requests[request]
        self._num_interactive -= request.slo.slo_class is SloClass.INTERACTIVE
        del self._growing[self._bucket(request)][request]
        self._batch = None
        request.num_planned_outputs = request.outputs_at(step)
        request.decode_since = -1

    def batch(self) -> DecodeBatch:
        """All of them; the same object until one comes or goes."""
        if self._batch is None:
            requests = tuple(self.requests)
            self._batch = DecodeBatch(requests, tuple([r.slot for r in requests]), self._num_interactive)
        return self._batch

    def growing(self, step: int) -> dict[Request, None]:
        """Those whose position to compute in `step` opens a new block."""
        return self._growing[step % self._block_size]

    def stop_at_length(self, step: int) -> list[Request]:
        """Stop and return those whose output reaches max_tokens in `step`, which was just planned."""
        ended: list[Request] = []
        heap = self._last_steps
        while heap and heap[0][0] <= step:
            last, _, request = heapq.heappop(heap)
            # One that was evicted and resumed before any step ran may be there twice.
            if self._is_last(request, last):
                self.stop(request, step + 1)
                ended.append(request)
        return ended

    @property
    def next_last_step(self) -> int | None:
        """No output reaches max_tokens before this step; None while none will."""
        return self._last_steps[0][0] if self._last_steps else None

    def is_idle(self) -> bool:
        """Nothing is counted for anybody. For tests."""
        return not (self.requests or self.context or self._num_interactive or any(self._growing))

    def _is_last(self, request: Request, step: int) -> bool:
        """Entries outlive their request's decoding: it may have ended or been preempted since."""
        return request in self.requests and request.outputs_at(step + 1) == request.max_tokens

    def _forget_ended(self) -> None:
        """Most entries are of requests that ended before their longest; keeping them keeps those."""
        self._last_steps = [entry for entry in self._last_steps if self._is_last(entry[2], entry[0])]
        heapq.heapify(self._last_steps)

    def _bucket(self, request: Request) -> int:
        since = request.decode_since
        return (since - request.tokens_at(since) + 1) % self._block_size
