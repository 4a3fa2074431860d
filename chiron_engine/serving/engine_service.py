"""The Engine service: one Connect stream per gateway, token ids in and out.

Outputs cross from the loop's thread to asyncio at most once a step, and leave as one message per
stream and step; a stream whose reader is slow gets several steps merged into one message.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

import grpc
import grpc.aio

from chiron_engine.core.engine_core import EngineLoad
from chiron_engine.core.requests import build_request
from chiron_engine.policy.iteration.request import Request, RequestState, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import Guide, SamplingParams
from chiron_engine.rpc.errors import invalid_argument, unavailable
from chiron_engine.rpc.v1 import engine_pb2, engine_pb2_grpc
from chiron_engine.rpc.wire import sampling_fields, slo_fields

from .engine_loop import EngineLoop, EngineUnavailable, LoopOutput, LoopState
from .engine_stream import Origin, Stream, finished_message, origin_of, refusal

FLUSH_POLL_S = 0.005
COMPILE_S = 5.0
CompileGuide = Callable[[Guide], object]


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What a gateway is told of the model. dtype: the one in use, never `auto`."""

    model: str
    architecture: str
    dtype: str
    eos_token_ids: tuple[int, ...]


class EngineService(engine_pb2_grpc.EngineServicer):
    """Answers from the first moment: until `attach`, with UNAVAILABLE and the load phase.

    Everything but `_receive` runs on the event loop that `attach` was called on.
    """

    def __init__(self) -> None:
        self.boot_id = uuid.uuid4().hex
        self.phase = "starting"
        self._loop: EngineLoop | None = None
        self._compile_guide: CompileGuide | None = None
        self._description = EngineDescription("", "", "", ())
        self._streams: set[Stream] = set()
        self._request_ids = itertools.count(1)
        self._seeds = random.Random()
        self._outputs: deque[LoopOutput] = deque()
        self._dispatch_due = False

    def attach(
        self,
        loop: EngineLoop,
        description: EngineDescription,
        seed: int = 0,
        compile_guide: CompileGuide | None = None,
    ) -> None:
        """Serve this loop from now on. `seed` starts the seeds of requests that bring none. compile_guide:
        called in threads; without it no output can follow a guide."""
        self._aio = asyncio.get_running_loop()
        self._loop = loop
        self._description = description
        self._compile_guide = compile_guide
        self._seeds.seed(seed)
        self._block_size = loop.shape.block_size
        self.phase = "ready"
        self._unsubscribe = loop.subscribe(self._receive)

    def announce_draining(self) -> None:
        """Tell every gateway, so that none sends more."""
        self.phase = "draining"
        for stream in self._streams:
            stream.ready.set()

    async def flush(self, timeout: float) -> None:
        """Wait until the streams have written all that was produced so far."""
        deadline = self._now() + timeout
        while any(s.has_output for s in self._streams) and self._now() < deadline:
            await asyncio.sleep(FLUSH_POLL_S)

    async def close(self, timeout: float) -> None:
        """Write what is left, then end every stream with UNAVAILABLE."""
        await self.flush(timeout)
        for stream in self._streams:
            stream.fail(unavailable("the engine is shut down", "draining"))
        if self._loop is not None:
            self._unsubscribe()

    async def GetStatus(
        self, request: engine_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.EngineStatus:
        status = engine_pb2.EngineStatus(boot_id=self.boot_id, pid=os.getpid(), phase=self._phase())
        if self._loop is None:
            return status
        load = self._loop.load
        status.step = load.step
        status.load.CopyFrom(self._wire_load(load))
        status.free_host_blocks = load.free_host_blocks
        status.total_host_blocks = load.total_host_blocks
        status.preemptions = load.preemptions
        status.prefix_hit_tokens = load.prefix_hit_tokens
        status.prefix_query_tokens = load.prefix_query_tokens
        return status

    async def Connect(
        self, commands: AsyncIterator[engine_pb2.EngineCommand], context: grpc.aio.ServicerContext
    ) -> None:
        loop = self._ready_loop()
        stream = Stream()
        self._streams.add(stream)
        reader = asyncio.create_task(self._read(commands, stream, loop))
        writer = asyncio.create_task(self._write(context, stream, loop))
        try:
            ends: list[asyncio.Future[None]] = [reader, writer, stream.failure]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            reader.cancel()
            self._leave(stream, loop)
            await writer  # gRPC takes no status while a write is under way
            for end in (stream.failure, reader):
                if end.done() and not end.cancelled():
                    end.result()  # raises what ended it
        finally:
            self._leave(stream, loop)
            reader.cancel()
            writer.cancel()
            stream.failure.cancel()

    def _leave(self, stream: Stream, loop: EngineLoop) -> None:
        self._streams.discard(stream)
        stream.is_over = True
        stream.ready.set()
        for compiling in stream.compiling.values():
            compiling.cancel()
        loop.abort(stream.request_ids.values())
        stream.request_ids = {}
        for saved in stream.saved.values():
            loop.forget(saved)
        stream.saved = {}

    async def _read(
        self, commands: AsyncIterator[engine_pb2.EngineCommand], stream: Stream, loop: EngineLoop
    ) -> None:
        """Returns when the gateway has closed its side."""
        async for command in commands:
            for submit in command.submits:
                self._submit(submit, stream, loop)
            aborted = [stream.request_ids[h] for h in command.aborts if h in stream.request_ids]
            if aborted:
                loop.abort(aborted)
            for handle in command.aborts:
                if (compiling := stream.compiling.pop(handle, None)) is not None:
                    compiling.cancel()
                    stream.finish_unstarted(handle)
            for key in command.forgets:
                if (saved := stream.saved.pop(key, None)) is not None:
                    loop.forget(saved)

    async def _write(self, context: grpc.aio.ServicerContext, stream: Stream, loop: EngineLoop) -> None:
        await context.write(engine_pb2.EngineEvent(hello=self._hello(loop)))
        while True:
            await stream.ready.wait()
            if stream.is_over:
                return
            stream.ready.clear()
            load = loop.load
            stream.is_writing = True
            await context.write(stream.take(self._wire_load(load), load.step))
            stream.is_writing = False

    def _submit(self, submit: engine_pb2.Submit, stream: Stream, loop: EngineLoop) -> None:
        if submit.handle in stream.request_ids or submit.handle in stream.compiling:
            raise invalid_argument(f"handle {submit.handle} is in use on this stream")
        kind, compile_guide = submit.sampling.WhichOneof("guide"), self._compile_guide
        if kind is None or compile_guide is None:
            self._take_in(submit, stream, loop)
            return
        guide = Guide(kind, getattr(submit.sampling, kind))
        compiling = self._compile_first(partial(compile_guide, guide), submit, stream, loop)
        stream.compiling[submit.handle] = asyncio.create_task(compiling)

    async def _compile_first(
        self, compiled: Callable[[], object], submit: engine_pb2.Submit, stream: Stream, loop: EngineLoop
    ) -> None:
        try:
            async with asyncio.timeout(COMPILE_S):
                guide = await asyncio.to_thread(compiled)
        except (ValueError, TimeoutError) as error:
            reason = str(error) or f"the guide was not compiled within {COMPILE_S:g} s; use a simpler one"
            stream.reject(submit.handle, grpc.StatusCode.INVALID_ARGUMENT, reason)
        else:
            self._take_in(submit, stream, loop, guide)
        finally:
            stream.compiling.pop(submit.handle, None)

    def _take_in(
        self, submit: engine_pb2.Submit, stream: Stream, loop: EngineLoop, guide: object = None
    ) -> None:
        try:
            request = self._resumed(submit, stream, loop) or self._build(submit, stream, loop, guide)
            request.num_preempted = max(request.num_preempted, submit.evictions)
            loop.submit(request)
        except ValueError as error:  # InvalidRequest too
            stream.reject(submit.handle, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except EngineUnavailable as error:
            stream.reject(submit.handle, grpc.StatusCode.UNAVAILABLE, str(error), 1000)
        else:
            stream.request_ids[submit.handle] = request.request_id

    def _resumed(self, submit: engine_pb2.Submit, stream: Stream, loop: EngineLoop) -> Request | None:
        """The evicted request that comes back here, if what was saved of it is of these tokens."""
        request = stream.saved.pop(submit.key, None)
        if request is None:
            return None
        if len(request.prompt_ids) + len(request.output_ids) != len(submit.prompt_token_ids):
            loop.forget(request)
            return None
        request.client = Origin(stream, submit.handle, submit.key)
        return request

    def _build(self, submit: engine_pb2.Submit, stream: Stream, loop: EngineLoop, guide: object) -> Request:
        now = loop.clock.now()
        slo = slo_fields(submit.slo)
        return build_request(
            next(self._request_ids),
            submit.prompt_token_ids,
            SamplingParams(**sampling_fields(submit.sampling)),
            shape=loop.shape,
            eos_token_ids=self._description.eos_token_ids,
            draw_seed=lambda: self._seeds.getrandbits(64),
            slo=Slo(
                SloClass.BATCH if slo["batch"] else SloClass.INTERACTIVE,
                slo["ttft_s"],
                slo["itl_s"],
                None if slo["deadline_s"] is None else now + slo["deadline_s"],
            ),
            arrival=now,
            client=Origin(stream, submit.handle, submit.key),
            guide=guide,
            num_prior_outputs=submit.prior_outputs,
        )

    def _receive(self, output: LoopOutput) -> None:
        """Called on the engine loop's thread, once a step. While a dispatch is due it will take
        this output too; it clears the flag before it looks, so none is left behind."""
        self._outputs.append(output)
        if not self._dispatch_due:
            self._dispatch_due = True
            self._aio.call_soon_threadsafe(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatch_due = False
        touched: set[Stream] = set()
        while self._outputs:
            self._sort(self._outputs.popleft(), touched)
        for stream in touched:
            stream.ready.set()
        if self._loop is not None and self._loop.state is LoopState.FAILED:
            self.phase = "failed"

    def _sort(self, output: LoopOutput, touched: set[Stream]) -> None:
        """Append an output's tokens and ends to the streams they belong to."""
        step = output.step
        if step.tokens is not None:
            for request, token in zip(step.requests, step.tokens, strict=True):
                origin = origin_of(request)
                if request.request_id in step.prompt_logprobs:
                    origin.stream.push_prompt(origin.handle, step.prompt_logprobs[request.request_id])
                origin.stream.push(origin.handle, token, step.logprobs.get(request.request_id))
                touched.add(origin.stream)
        for request in step.finished:
            origin = origin_of(request)
            origin.stream.request_ids.pop(origin.handle, None)
            origin.stream.finished.append(finished_message(origin.handle, request))
            touched.add(origin.stream)
        for request in step.handed_back:
            self._hand_back(request, touched)
        for rejection in output.rejected:
            origin = origin_of(rejection.request)
            origin.stream.reject(origin.handle, *refusal(rejection))

    def _hand_back(self, request: Request, touched: set[Stream]) -> None:
        """An evicted request leaves. What was saved of it stays only where it may come back for it."""
        origin = origin_of(request)
        stream = origin.stream
        saved = request.state is RequestState.EVICTED
        keeps = saved and bool(origin.key and request.host_blocks) and not stream.is_over
        if keeps and self._phase() == "ready":
            stream.saved[origin.key] = request
        elif saved and self._loop is not None:
            keeps = False
            self._loop.forget(request)
        stream.request_ids.pop(origin.handle, None)
        saved_tokens = len(request.host_blocks) * self._block_size if keeps else 0
        stream.evicted.append(engine_pb2.Evicted(handle=origin.handle, saved_tokens=saved_tokens))
        touched.add(stream)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _phase(self) -> str:
        if self._loop is not None and self._loop.state is not LoopState.RUNNING:
            return self._loop.state.value
        return self.phase

    def _ready_loop(self) -> EngineLoop:
        if self._loop is None:
            raise unavailable(f"the engine is loading ({self.phase})", "model_loading")
        if self._loop.state is not LoopState.RUNNING:
            state = self._loop.state.value
            raise unavailable(f"the engine takes no requests: it is {state}", state)
        return self._loop

    def _hello(self, loop: EngineLoop) -> engine_pb2.Hello:
        shape, description = loop.shape, self._description
        return engine_pb2.Hello(
            boot_id=self.boot_id,
            model=description.model,
            vocab_size=shape.vocab_size,
            max_model_len=min(shape.max_model_len, shape.num_device_blocks * shape.block_size),
            block_size=shape.block_size,
            max_num_seqs=shape.max_slots,
            load=self._wire_load(loop.load),
            architecture=description.architecture,
            dtype=description.dtype,
            eos_token_ids=description.eos_token_ids,
        )

    def _wire_load(self, load: EngineLoad) -> engine_pb2.EngineLoad:
        return engine_pb2.EngineLoad(
            running=load.running,
            waiting=load.waiting,
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
            max_running=load.max_running,
            draining=self._phase() != "ready",
        )
