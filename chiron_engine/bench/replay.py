"""Send each request of a workload at its time, whatever the server does, and note what comes back."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grpc
import grpc.aio

from chiron_engine.policy.iteration.request import SloClass
from chiron_engine.rpc.client import InferenceClient, sampling
from chiron_engine.rpc.errors import error_code
from chiron_engine.rpc.v1 import inference_pb2, types_pb2
from chiron_engine.sim.workload import Stream, Workload

from .prompts import PromptSource
from .request_log import SHORT_OUTPUT, RequestLog

AHEAD_REQUESTS = 256
AHEAD_TOKENS = 1 << 20
# How long before a request is due nothing else is begun.
CLEAR_S = 0.002
PROGRESS_S = 0.25
SLO_CLASSES = {
    SloClass.INTERACTIVE: types_pb2.SLO_CLASS_INTERACTIVE,
    SloClass.BATCH: types_pb2.SLO_CLASS_BATCH,
}
REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)


class Due(NamedTuple):
    """A request ready to be sent."""

    due_s: float
    request: int
    slo_class: SloClass
    message: inference_pb2.GenerateRequest
    output_tokens: int
    prompt_tokens: int


# Seconds since the start, requests sent, requests in flight.
Progress = Callable[[float, int, int], None]


def generate_request(stream: Stream, row: int, prompts: PromptSource) -> inference_pb2.GenerateRequest:
    """A row of a trace as a greedy request for exactly as many tokens as the trace says."""
    slo = types_pb2.Slo(
        slo_class=SLO_CLASSES[stream.slo_class],
        ttft_slo_ms=stream.slo.ttft_s * 1e3,
        itl_slo_ms=stream.slo.itl_s * 1e3,
    )
    if stream.slo_class is SloClass.BATCH:
        slo.deadline_s = stream.completion_s
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompts.tokens(stream, row).tolist()),
        sampling=sampling(temperature=0.0, max_tokens=stream.trace.output_tokens[row], ignore_eos=True),
        slo=slo,
    )


class Replay:
    """One run. `log` holds what was seen, also of a run that was stopped.

    Requests are made ahead of their time, while none is due. Times are read where a chunk reaches
    this process's event loop: work of this process delays what it sees, so it must not be busy.
    """

    def __init__(
        self,
        client: InferenceClient,
        workload: Workload,
        prompts: PromptSource,
        timeout_s: float | None = None,
    ) -> None:
        """timeout_s: deadline of each call; None is none."""
        self.log = RequestLog(workload.num_requests)
        self.sent = 0
        self.in_flight = 0
        self.wall_s = 0.0
        self._generate = client.stub.Generate
        self._timeout_s = timeout_s
        self._source = self._make(workload, prompts)
        self._ahead: deque[Due] = deque()
        self._ahead_tokens = 0
        self._start = 0.0

    async def run(self, stop: asyncio.Event, progress: Progress | None = None) -> bool:
        """Until every request has ended, or `stop` is set; what runs then is cancelled. Returns
        whether it went to the end."""
        await self._prepare(until=None)
        self._start = time.monotonic()
        work = asyncio.create_task(self._send_all())
        stopping = asyncio.create_task(stop.wait())
        ticking = asyncio.create_task(self._tick(progress)) if progress else None
        try:
            await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
            finished = work.done()
            if finished:
                work.result()
            self.wall_s = self._now()
            return finished
        finally:
            tasks = [task for task in (work, stopping, ticking) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _now(self) -> float:
        return time.monotonic() - self._start

    @staticmethod
    def _make(workload: Workload, prompts: PromptSource) -> Iterator[Due]:
        for due_s, request, stream, row in workload.arrivals():
            trace = stream.trace
            message = generate_request(stream, row, prompts)
            yield Due(
                due_s, request, stream.slo_class, message, trace.output_tokens[row], trace.prompt_tokens[row]
            )

    async def _prepare(self, until: float | None) -> None:
        """Make requests ahead until that time, or as many as may be held; at least one if none is."""
        while len(self._ahead) < AHEAD_REQUESTS and self._ahead_tokens < AHEAD_TOKENS:
            if self._ahead and until is not None and self._now() >= until:
                return
            due = next(self._source, None)
            if due is None:
                return
            self._ahead.append(due)
            self._ahead_tokens += due.prompt_tokens
            await asyncio.sleep(0)  # what has come in goes first

    async def _send_all(self) -> None:
        async with asyncio.TaskGroup() as calls:
            while (due := await self._next_due()) is not None:
                # Also when it is late already: a burst must not keep chunks from being read.
                await asyncio.sleep(max(0.0, due.due_s - self._now()))
                calls.create_task(self._serve(due))

    async def _next_due(self) -> Due | None:
        await self._prepare(until=self._ahead[0].due_s - CLEAR_S if self._ahead else 0.0)
        if not self._ahead:
            return None
        due = self._ahead.popleft()
        self._ahead_tokens -= due.prompt_tokens
        return due

    async def _serve(self, due: Due) -> None:
        self.sent += 1
        self.in_flight += 1
        self.log.sent(due.request, due.due_s, self._now())
        if due.slo_class is SloClass.BATCH:
            await self._serve_batch(due)
        else:
            await self._stream(due)
        self.in_flight -= 1

    async def _serve_batch(self, due: Due) -> None:
        """How a batch request reaches the server: as a stream of its class."""
        await self._stream(due)

    async def _stream(self, due: Due) -> None:
        log, request = self.log, due.request
        reason, last = types_pb2.FINISH_REASON_UNSPECIFIED, None
        try:
            async for chunk in self._generate(due.message, timeout=self._timeout_s):
                count = len(chunk.token_ids)
                if count:
                    log.tokens(request, self._now(), count)
                if chunk.finish_reason:
                    reason, last = chunk.finish_reason, chunk
        except grpc.aio.AioRpcError as error:
            log.failed(request, self._now(), error_name(error), rejected=self._is_refusal(request, error))
            return
        if last is None or reason != types_pb2.FINISH_REASON_LENGTH:
            name = types_pb2.FinishReason.Name(reason)
            log.failed(request, self._now(), f"ended with {name}", rejected=False)
        elif log.output_tokens[request] != due.output_tokens:
            log.failed(request, self._now(), SHORT_OUTPUT, rejected=False)
        else:
            log.finished(request, self._now(), last.timing.preemptions, last.usage.cached_tokens)

    def _is_refusal(self, request: int, error: grpc.aio.AioRpcError) -> bool:
        """Whether a server that answers did not take the request. UNAVAILABLE is also what the
        client's own side says where nobody answers; a server's carries a code."""
        if self.log.output_tokens[request]:
            return False
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return error_code(error) not in (None, "engine_lost")
        return error.code() in REFUSALS

    async def _tick(self, progress: Progress) -> None:
        while True:
            progress(self._now(), self.sent, self.in_flight)
            await asyncio.sleep(PROGRESS_S)


def error_name(error: grpc.aio.AioRpcError) -> str:
    """As `RESOURCE_EXHAUSTED rate_limit_exceeded`: the status, and which case of it if said."""
    case = error_code(error)
    return error.code().name if case is None else f"{error.code().name} {case}"
