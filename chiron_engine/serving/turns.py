"""Two ways to run the same core for a caller that waits: in its own thread, or in the loop's."""

from __future__ import annotations

from collections.abc import Iterable
from queue import SimpleQueue
from typing import Protocol

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.requests import InvalidRequest, QueueFull
from chiron_engine.policy.iteration.request import Request

from .engine_loop import EngineLoop, LoopOutput, Rejection


class Turns(Protocol):
    """Submitted requests end up in the `step.finished` or the `rejected` of one turn."""

    def submit(self, request: Request) -> None: ...

    def abort(self, request_ids: Iterable[int]) -> None: ...

    def next(self) -> LoopOutput:
        """Wait for the next turn. It may bring nothing, or tokens of other callers' requests."""
        ...

    def close(self) -> None: ...


class CallerTurns:
    """Runs the core in the calling thread, which must be the only one that does."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._rejected: list[Rejection] = []

    def submit(self, request: Request) -> None:
        try:
            self._core.add(request)
        except (QueueFull, InvalidRequest) as error:
            self._rejected.append(Rejection(request, error))

    def abort(self, request_ids: Iterable[int]) -> None:
        for request_id in request_ids:
            self._core.abort(request_id)

    def next(self) -> LoopOutput:
        step = self._core.step()
        rejected, self._rejected = self._rejected, []
        return LoopOutput(step, self._core.load(), rejected)

    def close(self) -> None:
        """Nothing to undo: the core stays."""


class LoopTurns:
    """Waits for the thread of an EngineLoop, which serves other callers too."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._outputs: SimpleQueue[LoopOutput] = SimpleQueue()
        self._unsubscribe = loop.subscribe(self._outputs.put)

    def submit(self, request: Request) -> None:
        """Raises EngineUnavailable when the loop has ended."""
        self._loop.submit(request)

    def abort(self, request_ids: Iterable[int]) -> None:
        self._loop.abort(request_ids)

    def next(self) -> LoopOutput:
        return self._outputs.get()

    def close(self) -> None:
        self._unsubscribe()
