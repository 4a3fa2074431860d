"""Runs a list of requests to their end, in the order and at the pace the queue's bounds allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from chiron_engine.core.clocks import Clock
from chiron_engine.core.requests import QueueFull
from chiron_engine.policy.iteration.request import Request

from .engine_loop import LoopOutput
from .outputs import OutputCollector, RequestOutput
from .turns import Turns


class OfflineBatch:
    """One call of `generate`. on_finished(tokens): called as each request ends."""

    def __init__(
        self,
        collectors: Sequence[OutputCollector],
        turns: Turns,
        clock: Clock,
        *,
        window: int,
        on_finished: Callable[[int], None],
    ) -> None:
        """window: requests handed over at once, at most the bound of the core's queue."""
        self._turns = turns
        self._clock = clock
        self._window = window
        self._on_finished = on_finished
        self._order = [collector.request.request_id for collector in collectors]
        self._waiting: deque[OutputCollector] = deque(collectors)
        self._open: dict[int, OutputCollector] = {}
        self._outputs: dict[int, RequestOutput] = {}

    def run(self) -> list[RequestOutput]:
        """Outputs in the order of the requests. Raises InvalidRequest for one that can never fit;
        the others are then aborted, as they are when this is interrupted."""
        try:
            while len(self._outputs) < len(self._order):
                self._submit()
                self._take(self._turns.next())
        finally:
            self._turns.abort(list(self._open))
            self._turns.close()
        return [self._outputs[request_id] for request_id in self._order]

    def _submit(self) -> None:
        while self._waiting and len(self._open) < self._window:
            collector = self._waiting.popleft()
            self._open[collector.request.request_id] = collector
            self._turns.submit(collector.request)

    def _take(self, output: LoopOutput) -> None:
        now = self._clock.now()
        step = output.step
        for request, token in zip(step.requests, step.tokens or (), strict=True):
            collector = self._open.get(request.request_id)
            if collector is None:  # another caller's, or aborted at a stop string
                continue
            if request.request_id in step.prompt_logprobs:
                collector.add_prompt(step.prompt_logprobs[request.request_id])
            collector.add(token, now, step.logprobs.get(request.request_id))
            if collector.stopped:
                self._turns.abort([request.request_id])
                self._finish(request, now)
        for request in step.finished:
            self._finish(request, now)
        for rejection in reversed(output.rejected):
            self._retry(rejection.request, rejection.error)

    def _finish(self, request: Request, now: float) -> None:
        collector = self._open.pop(request.request_id, None)
        if collector is None:
            return
        _, output = collector.finish(now)
        self._outputs[request.request_id] = output
        self._on_finished(len(output.token_ids))

    def _retry(self, request: Request, error: Exception) -> None:
        """A full queue has room again after some steps; any other refusal stands."""
        collector = self._open.pop(request.request_id, None)
        if collector is None:
            return
        if not isinstance(error, QueueFull):
            raise error
        self._waiting.appendleft(collector)
