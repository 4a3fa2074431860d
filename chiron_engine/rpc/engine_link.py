"""One Connect stream to one engine: submits and aborts out, tokens in, reconnecting when it breaks."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable

import grpc
import grpc.aio

from .options import channel_options
from .token_stream import TokenStream
from .v1 import engine_pb2, engine_pb2_grpc, types_pb2

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 2.0
# An engine message may hold many prompts; this keeps it well under the message limit.
MAX_COMMAND_TOKENS = 1 << 19


class EngineLink:
    """Keeps one engine connected. Use from one event loop only; closed, it is not started again.

    on_change: called whenever `is_ready` may have changed. boot_id: of the engine it is for, where that
    is known: another one that answers at the address is left alone.
    """

    def __init__(
        self, address: str, on_change: Callable[[], None] = lambda: None, boot_id: str | None = None
    ) -> None:
        self.address = address
        self.hello: engine_pb2.Hello | None = None  # of the last connection
        self.load = engine_pb2.EngineLoad()
        self._on_change = on_change
        self._boot_id = boot_id
        self._connected = False
        self._streams: dict[int, TokenStream] = {}
        self._handles = itertools.count(1)
        self._submits: list[engine_pb2.Submit] = []
        self._aborts: list[int] = []
        self._forgets: list[int] = []
        self._unsent = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False

    @property
    def is_ready(self) -> bool:
        return self._connected and not self.load.draining

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def outstanding(self) -> int:
        """Requests that this process, or the engine as it last said, has there."""
        return max(len(self._streams), self.load.running + self.load.waiting)

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_connected(), name=f"engine-link {self.address}")

    async def close(self) -> None:
        """Drop the connection; the engine aborts what came over it."""
        if self._task is None:
            return
        self._is_closing = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def run(self, stream: TokenStream) -> None:
        """Start an attempt of this request here. It is lost at once where the engine is not connected."""
        handle = next(self._handles)
        submit = stream.submission(self, handle)
        if not self._connected:
            stream.lose()
            return
        self._streams[handle] = stream
        self._submits.append(submit)
        self._unsent.set()

    def forget(self, key: int) -> None:
        """Let go what the engine has saved of an evicted request."""
        if self._connected:
            self._forgets.append(key)
            self._unsent.set()

    def abort(self, handle: int) -> None:
        if handle in self._streams:
            self._aborts.append(handle)
            self._unsent.set()

    def abandon(self, handle: int) -> None:
        self.abort(handle)
        self._streams.pop(handle, None)

    def take_back(self, handle: int) -> None:
        stream = self._streams.get(handle)
        if stream is not None:
            self.abandon(handle)
            stream.evict(engine_pb2.Evicted(handle=handle))

    async def _keep_connected(self) -> None:
        """Until it is closed. Where a call fails just then, as the engine has been killed, gRPC takes the
        cancellation for one of its own, and only the call's failure is raised here."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                was_connected = await self._connect_once()
            except Exception:  # of whoever owns a stream, or an engine that talks nonsense
                log.exception("engine %s: the link failed, and connects again", self.address)
                was_connected = False
            if self._is_closing:
                return
            retry_s = FIRST_RETRY_S if was_connected else min(retry_s * 2, LONGEST_RETRY_S)
            await asyncio.sleep(retry_s * random.uniform(0.8, 1.2))

    async def _connect_once(self) -> bool:
        """One connection, to its end. Returns whether the engine greeted us."""
        # A pool of its own, or a new channel would wait out the old one's reconnection backoff.
        options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        greeted = False
        try:
            async with grpc.aio.insecure_channel(self.address, options=options) as channel:
                call = engine_pb2_grpc.EngineStub(channel).Connect()
                event = await call.read()
                if event is grpc.aio.EOF:
                    return False
                if self._boot_id is not None and event.hello.boot_id != self._boot_id:
                    log.warning(
                        "the engine that answers at %s has the boot id %s, not %s; is the address right?",
                        self.address,
                        event.hello.boot_id,
                        self._boot_id,
                    )
                    return False
                greeted = True
                self._greet(event.hello)
                await self._exchange(call)
        except grpc.aio.AioRpcError as error:
            log.log(
                logging.WARNING if greeted else logging.DEBUG,
                "engine %s: %s: %s",
                self.address,
                error.code().name,
                error.details(),
            )
        finally:
            self._lose_all()
        return greeted

    def _greet(self, hello: engine_pb2.Hello) -> None:
        self.hello = hello
        self.load = hello.load
        self._connected = True
        log.info("engine %s is ready: %s, boot %s", self.address, hello.model, hello.boot_id)
        self._on_change()

    async def _exchange(self, call: grpc.aio.StreamStreamCall) -> None:
        sender = asyncio.create_task(self._send(call))
        try:
            while (event := await call.read()) is not grpc.aio.EOF:
                self._receive(event.output)
        finally:
            sender.cancel()
            call.cancel()

    async def _send(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            await self._unsent.wait()
            try:
                await call.write(self._next_command())
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reader learns the reason

    def _next_command(self) -> engine_pb2.EngineCommand:
        """All that waits, but no more prompts than one message should hold."""
        count, tokens = 0, 0
        for submit in self._submits:
            tokens += len(submit.prompt_token_ids)
            if count and tokens > MAX_COMMAND_TOKENS:
                break
            count += 1
        submits, self._submits = self._submits[:count], self._submits[count:]
        if self._submits:  # aborts stay behind the submits they may name
            return engine_pb2.EngineCommand(submits=submits)
        aborts, self._aborts = self._aborts, []
        forgets, self._forgets = self._forgets, []
        self._unsent.clear()
        return engine_pb2.EngineCommand(submits=submits, aborts=aborts, forgets=forgets)

    def _receive(self, output: engine_pb2.StepOutput) -> None:
        now = time.monotonic()
        streams = self._streams
        for prompt in output.prompt_logprobs:
            if (stream := self._streams.get(prompt.handle)) is not None:
                stream.prompt_logprobs = list(prompt.tokens)
        for place, (handle, token) in enumerate(zip(output.handles, output.token_ids, strict=True)):
            stream = streams.get(handle)
            if stream is None:
                continue
            if stream.asks_logprobs and place in output.logprobs:
                stream.logprobs.append(output.logprobs[place])
            stream.push(token, now)
        for finished in output.finished:
            if (stream := self._streams.pop(finished.handle, None)) is not None:
                _end(stream, finished)
        for evicted in output.evicted:
            if (stream := self._streams.pop(evicted.handle, None)) is not None:
                stream.evict(evicted)
        for rejected in output.rejected:
            if (stream := self._streams.pop(rejected.handle, None)) is not None:
                stream.reject(rejected)
        was_draining, self.load = self.load.draining, output.load
        if was_draining != self.load.draining:
            self._on_change()

    def _lose_all(self) -> None:
        self._connected = False
        streams, self._streams = self._streams, {}
        self._submits, self._aborts, self._forgets = [], [], []
        self._unsent.clear()
        for stream in streams.values():
            _lose(stream)
        self._on_change()


def _lose(stream: TokenStream) -> None:
    """What its owner makes of that must neither cost the others theirs nor keep the link from closing."""
    if stream.has_ended:  # by what became of one before it
        return
    try:
        stream.lose()
    except Exception:
        log.exception("request %s could not be told that its engine is gone", stream.request_id)


def _end(stream: TokenStream, finished: engine_pb2.Finished) -> None:
    """An engine that fails, or is shut down, ends its requests; they may go on elsewhere."""
    shut_down = finished.reason == types_pb2.FINISH_REASON_ABORT and not stream.is_aborted
    if shut_down or finished.reason == types_pb2.FINISH_REASON_ERROR:
        stream.lose()
    else:
        stream.finish(finished)
