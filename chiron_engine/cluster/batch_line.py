"""One line of a batch on its way through the fleet."""

from __future__ import annotations

import asyncio
from typing import Protocol

from chiron_engine.rpc.token_stream import StreamOwner, TokenStream
from chiron_engine.rpc.v1 import inference_pb2

from .batch_records import PendingLine


class LineListener(Protocol):
    def line_paused(self, line: BatchLine, is_evicted: bool) -> None: ...

    def line_ended(self, line: BatchLine) -> None: ...


class BatchLine:
    """Owner of its stream: passes on to the router, which chooses engines, and tells `listener`.

    key: its request id in the fleet policy. starting: set once it has a place on an engine. attempt,
    request and stream: set once it is claimed. noted: tokens the store has. is_withdrawn: it is to be
    stopped. is_stopped: it has, at a stop string, for which `watching` looks.
    is_evicted: so it is for the store; it may run again.
    """

    __slots__ = (
        "_listener",
        "_router",
        "attempt",
        "is_evicted",
        "is_stopped",
        "is_withdrawn",
        "key",
        "noted",
        "pending",
        "request",
        "starting",
        "stream",
        "watching",
    )

    def __init__(self, pending: PendingLine, key: int, listener: LineListener, router: StreamOwner) -> None:
        self.pending = pending
        self.key = key
        self.attempt = 0
        self.noted = 0
        self.request = inference_pb2.GenerateRequest()
        self.stream: TokenStream | None = None
        self.starting: asyncio.Task[TokenStream] | None = None
        self.watching: asyncio.Task[None] | None = None
        self.is_withdrawn = False
        self.is_stopped = False
        self.is_evicted = False
        self._listener = listener
        self._router = router

    @property
    def is_started(self) -> bool:
        return self.starting is not None

    def paused(self, stream: TokenStream) -> None:
        pause = stream.pause
        self._router.paused(stream)
        if not stream.has_ended:
            self._listener.line_paused(self, pause is not None and pause.evicted)

    def ended(self, stream: TokenStream) -> None:
        self._router.ended(stream)
        self._listener.line_ended(self)
