"""Carries tokens from the engine loop's thread to coroutines, with one wake-up per step."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable

from chiron_engine.core.clocks import Clock
from chiron_engine.core.requests import InvalidRequest, QueueFull
from chiron_engine.policy.iteration.plan import TokenLogprobs
from chiron_engine.policy.iteration.request import Request

from .engine_loop import EngineLoop, EngineUnavailable, LoopOutput


class Finished:
    """The end of a stream."""


Token = tuple[int, TokenLogprobs | None]
PromptLogprobs = list[TokenLogprobs]
Event = Token | PromptLogprobs | Finished | QueueFull | InvalidRequest | EngineUnavailable
Events = asyncio.Queue[tuple[float, Event]]


class TokenStreams:
    """Streams of single requests out of one EngineLoop, for coroutines of any event loop."""

    def __init__(self, loop: EngineLoop, clock: Clock) -> None:
        self._loop = loop
        self._clock = clock
        # By request id. Coroutines add and remove, the loop's thread reads: single operations on a
        # dictionary, which are atomic.
        self._streams: dict[int, tuple[asyncio.AbstractEventLoop, Events]] = {}
        loop.subscribe(self._receive)

    async def run(
        self, request: Request, on_prompt: Callable[[list[TokenLogprobs]], None]
    ) -> AsyncGenerator[tuple[float, Token], None]:
        """Time and token, one after another. Leaving the iteration early aborts the request. on_prompt:
        called before the first with the prompt's log probabilities, where they are asked for.

        Raises QueueFull, InvalidRequest or EngineUnavailable where the engine refuses it.
        """
        events: Events = asyncio.Queue()
        self._streams[request.request_id] = (asyncio.get_running_loop(), events)
        ended = False
        try:
            self._loop.submit(request)
            while True:
                time, event = await events.get()
                if isinstance(event, tuple):
                    yield time, event
                    continue
                if isinstance(event, list):
                    on_prompt(event)
                    continue
                ended = True
                if isinstance(event, Finished):
                    return
                raise event
        finally:
            self._streams.pop(request.request_id, None)
            if not ended:
                self._loop.abort([request.request_id])

    def _receive(self, output: LoopOutput) -> None:
        """Called on the engine loop's thread, once a step."""
        now = self._clock.now()
        step = output.step
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Events, Event]]] = defaultdict(list)

        def deliver(request: Request, event: Event) -> None:
            if (stream := self._streams.get(request.request_id)) is not None:
                by_loop[stream[0]].append((stream[1], event))

        for request, token in zip(step.requests, step.tokens or (), strict=True):
            if request.request_id in step.prompt_logprobs:
                deliver(request, step.prompt_logprobs[request.request_id])
            deliver(request, (token, step.logprobs.get(request.request_id)))
        for request in step.finished:
            deliver(request, Finished())
        for rejection in output.rejected:
            deliver(rejection.request, rejection.error)
        for aio, events in by_loop.items():
            if not aio.is_closed():
                aio.call_soon_threadsafe(_put_all, now, events)


def _put_all(now: float, events: list[tuple[Events, Event]]) -> None:
    for queue, event in events:
        queue.put_nowait((now, event))
