"""What a gateway needs of whoever chooses engines: a pool of its own, or the coordinator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from chiron_engine.rpc.token_stream import StreamOwner, TokenStream
from chiron_engine.rpc.v1 import engine_pb2


class EngineRouter(StreamOwner, Protocol):
    """Runs streams on engines. Used from one event loop."""

    @property
    def hello(self) -> engine_pb2.Hello | None:
        """What an engine said of the model; all serve the same one. None before any was ready."""
        ...

    @property
    def num_ready(self) -> int: ...

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever `num_ready` may have changed."""
        ...

    def start(self) -> None: ...

    async def close(self) -> None: ...

    def submit(self, stream: TokenStream, received: float) -> None:
        """Take over a request that came in at `received`, on `time.monotonic`: from now on the stream
        runs or waits until it ends. A failure is told by the stream."""
        ...
