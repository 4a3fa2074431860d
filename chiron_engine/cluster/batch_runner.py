"""Runs the lines of the batch store on the fleet: from the store to the fleet policy and back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from chiron_engine.policy.fleet.messages import FleetRequest
from chiron_engine.policy.iteration.request import Slo, SloClass
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import engine_pb2, inference_pb2, types_pb2

from .batch_errors import BatchStoreError
from .batch_line import BatchLine
from .batch_outcome import BatchText, claim_again, outcome, reporting
from .batch_records import Claim, PendingLine, Progress, Submitted, Withdrawn
from .batch_store import BatchStore
from .batch_store_thread import BatchStoreClosed, BatchStoreThread
from .batch_window import BatchWindow, WindowChange
from .coordinator import Coordinator

log = logging.getLogger(__name__)

WINDOW_LINES = 8192
PAGE_LINES = 1024
LINES_PER_TURN = 64
"""Given to the policy between two turns of the event loop."""
CHECKPOINT_S = 2.0
RETRY_S = 1.0
"""Between two tries of a store that fails: its disk may have space again."""


class BatchRunner:
    """Owner of the queue between the store and the coordinator, on the coordinator's event loop.

    A line waits in the store. Of those that wait the first to be due are also requests of the fleet
    policy (`BatchWindow`); once one has a place on an engine it is claimed and its stream started.
    Whatever becomes of a stream is told to the store under the claim's attempt, which takes one result.
    """

    def __init__(
        self,
        store: BatchStoreThread,
        coordinator: Coordinator,
        text: BatchText,
        *,
        wall_time: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._coordinator = coordinator
        self._text = text
        self._window = BatchWindow(WINDOW_LINES)
        self._wall_time = wall_time
        self._lines: dict[int, BatchLine] = {}
        """By line id: those in the policy."""
        self._offered: list[PendingLine] = []
        self._wanted = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_draining = False
        self._is_closed = False
        self._trouble = ""

    async def start(self) -> None:
        """Take up what a coordinator before this one left. Raises BatchStoreError."""
        now = self._wall_time()
        await self._store.call(lambda store: store.recover(now))
        self._loops = [self._spawn(self._keep_filling()), self._spawn(self._keep_noting())]
        self._wanted.set()

    def drain(self) -> None:
        """Start no more lines; those that run go on."""
        self._is_draining = True
        for line in [line for line in self._lines.values() if not line.is_started]:
            self._drop(line)

    async def close(self) -> None:
        """Give what still runs back to the store, with the tokens it has. To be called once the
        coordinator is closed, before the store is."""
        self.drain()
        self._is_closed = True
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        for line in list(self._lines.values()):
            self._settle(line)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What the Batch service tells.

    def on_submitted(self, submitted: Submitted) -> None:
        self._offered += submitted.lines
        self._wanted.set()

    def on_withdrawn(self, withdrawn: Withdrawn) -> None:
        for line_id in withdrawn.ended:
            self._window.remove(line_id)
            if (line := self._lines.get(line_id)) is not None:
                self._stop(line)
        for running in withdrawn.to_stop:
            if (line := self._lines.get(running.line_id)) is not None:
                self._stop(line)

    # What its lines tell.

    def line_paused(self, line: BatchLine, is_evicted: bool) -> None:
        """It left an engine; the coordinator sees to its going on, and may have done so already."""
        stream = line.stream
        if not is_evicted or stream is None or stream.is_running:
            return
        line.is_evicted = True
        line_id, now, tokens = line.pending.line_id, self._wall_time(), stream.tokens[:]
        evict = reporting(line, lambda store, attempt: store.evict(line_id, attempt, tokens, now), now)
        self._spawn(self._persist(evict))

    def line_ended(self, line: BatchLine) -> None:
        self._settle(line)

    # From the store to the policy.

    async def _keep_filling(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._fill()
            except BatchStoreClosed:
                return
            except BatchStoreError as error:
                await self._pause(error)
                self._wanted.set()

    async def _fill(self) -> None:
        while not self._is_draining:
            if self._offered:
                offered, self._offered = self._offered, []
                new = (line for line in offered if line.line_id not in self._lines)
                await self._change(self._window.offer(new))
            elif self._window.wants_more:
                page = await self._next_page()
                await self._change(self._window.extend(page, len(page) < PAGE_LINES))
            else:
                return

    async def _next_page(self) -> tuple[PendingLine, ...]:
        after = self._window.horizon
        return await self._store.call(lambda store: store.waiting(after, PAGE_LINES))

    async def _change(self, change: WindowChange) -> None:
        for pending in change.leave:
            if (line := self._lines.get(pending.line_id)) is not None and not line.is_started:
                self._drop(line)
        for place, pending in enumerate(change.enter):
            if place % LINES_PER_TURN == LINES_PER_TURN - 1:
                await asyncio.sleep(0)
            if pending.line_id in self._window and pending.line_id not in self._lines:
                self._enter(pending)

    def _enter(self, pending: PendingLine) -> None:
        if self._is_draining:
            return
        key = self._coordinator.next_key()
        line = self._lines[pending.line_id] = BatchLine(pending, key, self, self._coordinator)
        self._coordinator.enqueue(self._request(line), partial(self._start, line))

    def _request(self, line: BatchLine) -> FleetRequest:
        """Times are those of the store moved to the coordinator's clock."""
        pending = line.pending
        offset = self._coordinator.clock() - self._wall_time()
        deadline = None if pending.deadline is None else pending.deadline + offset
        return FleetRequest(
            request_id=line.key,
            slo=Slo(SloClass.BATCH, pending.ttft_slo_s, pending.itl_slo_s, deadline),
            arrival=pending.created + offset,
            prompt_tokens=pending.prompt_tokens,
            max_tokens=pending.max_tokens,
            produced=pending.produced,
        )

    # From the policy to an engine.

    async def _start(self, line: BatchLine) -> TokenStream:
        """The coordinator asks for it again where the engine was lost before the stream was there."""
        if line.starting is None:
            line.starting = self._spawn(self._start_once(line))
            self._window.remove(line.pending.line_id)
            if self._window.wants_more:
                self._wanted.set()
        return await asyncio.shield(line.starting)

    async def _start_once(self, line: BatchLine) -> TokenStream:
        if self._lines.get(line.pending.line_id) is not line:
            return self._nothing(line)
        claim = await self._claim(line)
        if claim is None:  # it was withdrawn meanwhile
            self._forget(line)
            return self._nothing(line)
        stream = self._stream(line, claim)
        hello = self._coordinator.hello
        if line.is_withdrawn:
            stream.abort()
        elif hello is not None and (reason := stream.end_of(hello)) is not None:
            stream.finish(engine_pb2.Finished(reason=reason))
        if stream.has_ended:
            self._coordinator.cancel(line.key)
        return stream

    async def _claim(self, line: BatchLine) -> Claim | None:
        line_id = line.pending.line_id
        now = self._wall_time()
        claims = await self._persist(lambda store: store.claim([line_id], now))
        return claims[0] if claims else None

    def _stream(self, line: BatchLine, claim: Claim) -> TokenStream:
        request = line.request = inference_pb2.GenerateRequest.FromString(claim.request)
        line.attempt = claim.attempt
        line.noted = len(claim.produced)
        deadline = line.pending.deadline
        if deadline is not None:
            request.slo.deadline_s = max(1e-3, deadline - self._wall_time())
        stream = line.stream = TokenStream(
            request.token_ids.ids,
            request.sampling,
            request.slo,
            f"batch-{line.pending.line_id}",
            line,
            tokens=claim.produced,
            max_pending=None,
        )
        stream.key = line.key
        if (watcher := self._text.watcher(request)) is not None:
            line.watching = self._spawn(self._watch(line, stream, watcher))
        return stream

    def _nothing(self, line: BatchLine) -> TokenStream:
        """A stream that has ended, for a line that is not to be run."""
        self._coordinator.cancel(line.key)
        stream = TokenStream((), types_pb2.SamplingParams(), types_pb2.Slo(), "", self._coordinator)
        stream.abort()
        return stream

    async def _watch(
        self, line: BatchLine, stream: TokenStream, is_stopped: Callable[[Sequence[int]], bool]
    ) -> None:
        """End it at a stop string, which no engine knows of."""
        while True:
            tokens = await stream.next()
            if stream.has_ended:
                return
            if is_stopped(tokens):
                line.is_stopped = True
                stream.abort()
                return

    # From the engine to the store.

    async def _keep_noting(self) -> None:
        """Tokens are noted now and then, so that the end of this process costs little work."""
        while True:
            await asyncio.sleep(CHECKPOINT_S)
            try:
                await self._resume()
                await self._note()
                await self._expire()
            except BatchStoreClosed:
                return
            except BatchStoreError as error:
                await self._pause(error)

    async def _expire(self) -> None:
        now = self._wall_time()
        self.on_withdrawn(await self._store.call(lambda store: store.expire(now)))

    async def _resume(self) -> None:
        """Evicted lines that run again are running for the store, too."""
        resumed = [
            line
            for line in self._lines.values()
            if line.is_evicted and line.stream is not None and line.stream.is_running
        ]
        now = self._wall_time()
        for line in resumed:
            line.is_evicted = False  # before the store answers: it may be evicted again meanwhile
        try:
            if resumed:
                await self._store.call(lambda store: [claim_again(store, line, now) for line in resumed])
        except BatchStoreError:
            for line in resumed:
                line.is_evicted = True
            raise

    async def _note(self) -> None:
        noted: list[tuple[BatchLine, int]] = []
        progress: list[Progress] = []
        for line in self._lines.values():
            stream = line.stream
            if stream is not None and len(stream.tokens) > line.noted:
                noted.append((line, len(stream.tokens)))
                progress.append(Progress(line.pending.line_id, line.attempt, stream.tokens[:]))
        if not progress:
            return
        await self._store.call(lambda store: store.checkpoint(progress))
        self._well()
        for line, count in noted:
            line.noted = max(line.noted, count)

    def _settle(self, line: BatchLine) -> None:
        """Tell the store what became of a line that has ended, or that this runner drops."""
        if self._lines.get(line.pending.line_id) is not line:
            return
        self._forget(line)
        if line.watching is not None:
            line.watching.cancel()
        if line.stream is not None:
            self._spawn(self._persist(outcome(line, line.stream, self._text, self._wall_time())))

    async def _persist(self, operation: Callable[[BatchStore], Any]) -> Any:
        """Try until the store takes it. What it never takes before the end of this process is done again
        after: the line still runs, as far as the store knows."""
        while True:
            try:
                result = await self._store.call(operation)
            except BatchStoreClosed:
                raise
            except BatchStoreError as error:
                if self._is_closed:
                    self._say(error)
                    raise
                await self._pause(error)
            else:
                self._well()
                return result

    # Small steps of the above.

    def _stop(self, line: BatchLine) -> None:
        """The line is to run no more."""
        line.is_withdrawn = True
        if line.stream is not None:
            line.stream.abort()
        elif not line.is_started:
            self._drop(line)

    def _drop(self, line: BatchLine) -> None:
        self._forget(line)
        self._coordinator.cancel(line.key)

    def _forget(self, line: BatchLine) -> None:
        self._window.remove(line.pending.line_id)
        self._lines.pop(line.pending.line_id, None)

    async def _pause(self, error: BatchStoreError) -> None:
        self._say(error)
        await asyncio.sleep(RETRY_S)

    def _say(self, error: BatchStoreError) -> None:
        """Once, however often it is met."""
        if str(error) == self._trouble:
            return
        self._trouble = str(error)
        log.error("%s; batch work waits, and what cannot be stored is done again", error)

    def _well(self) -> None:
        """Something was written."""
        if self._trouble:
            log.info("the batch store takes results again")
            self._trouble = ""

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and not isinstance(task.exception(), BatchStoreError | None):
            log.error("a task of the batch queue failed", exc_info=task.exception())
