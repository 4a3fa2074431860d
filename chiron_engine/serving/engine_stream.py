"""One gateway's stream on an engine: what waits to be written to it, and the messages it is made of."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

import grpc

from chiron_engine.core.requests import InvalidRequest, QueueFull
from chiron_engine.policy.iteration.plan import TokenLogprobs
from chiron_engine.policy.iteration.request import FinishReason, Request
from chiron_engine.rpc.errors import RpcFailure, exhausted
from chiron_engine.rpc.v1 import engine_pb2, types_pb2

from .engine_loop import Rejection

# Tokens a stream may hold back for its reader before it is closed: some 256 KiB on the wire.
MAX_PENDING_TOKENS = 1 << 16

FINISH_REASONS = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: types_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: types_pb2.FINISH_REASON_ERROR,
}
ENGINE_FAILED = "the engine failed"


@dataclass(slots=True, eq=False)
class Origin:
    """Where a request came from; its `client`. key: its name over all its attempts, 0 for none."""

    stream: Stream
    handle: int
    key: int = 0


@dataclass(slots=True, eq=False)
class Stream:
    """One gateway's stream: its live requests, and what waits to be written to it. `failure` ends
    the call with an error; `is_over`: nothing more is to be written. saved: evicted requests whose
    KV waits here for them, by key. compiling: by handle, those that wait for their guide."""

    request_ids: dict[int, int] = field(default_factory=dict)  # by handle
    saved: dict[int, Request] = field(default_factory=dict)
    compiling: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    handles: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: dict[int, types_pb2.TokenLogprobs] = field(default_factory=dict)  # by place in `tokens`
    prompt_logprobs: list[engine_pb2.PromptLogprobs] = field(default_factory=list)
    finished: list[engine_pb2.Finished] = field(default_factory=list)
    rejected: list[engine_pb2.Rejected] = field(default_factory=list)
    evicted: list[engine_pb2.Evicted] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    is_writing: bool = False
    is_over: bool = False
    failure: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def has_output(self) -> bool:
        return self.is_writing or bool(self.tokens or self.finished or self.rejected or self.evicted)

    def push(self, handle: int, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Without effect once the stream has failed: nobody will read it."""
        if self.failure.done():
            return
        if logprobs is not None:
            self.logprobs[len(self.tokens)] = logprobs_message(logprobs)
        self.handles.append(handle)
        self.tokens.append(token)
        if len(self.tokens) > MAX_PENDING_TOKENS:
            self.fail(
                exhausted(f"the stream is read too slowly: {MAX_PENDING_TOKENS} tokens wait", "slow_reader")
            )

    def push_prompt(self, handle: int, logprobs: Iterable[TokenLogprobs]) -> None:
        """Of the prompt's tokens; its first token is to follow."""
        if not self.failure.done():
            tokens = [logprobs_message(one) for one in logprobs]
            self.prompt_logprobs.append(engine_pb2.PromptLogprobs(handle=handle, tokens=tokens))

    def fail(self, failure: RpcFailure) -> None:
        """End the stream's requests now, and the call with this error once it can be sent."""
        if not self.failure.done():
            self.failure.set_exception(failure)

    def reject(
        self, handle: int, code: grpc.StatusCode, message: str, retry_after_ms: int | None = None
    ) -> None:
        self.request_ids.pop(handle, None)
        self.rejected.append(
            engine_pb2.Rejected(
                handle=handle, code=code.value[0], message=message, retry_after_ms=retry_after_ms or 0
            )
        )
        self.ready.set()

    def finish_unstarted(self, handle: int) -> None:
        """It was aborted before the engine knew of it."""
        self.finished.append(engine_pb2.Finished(handle=handle, reason=types_pb2.FINISH_REASON_ABORT))
        self.ready.set()

    def take(self, load: engine_pb2.EngineLoad, step: int) -> engine_pb2.EngineEvent:
        """Everything that waits, as one message."""
        output = engine_pb2.StepOutput(
            step=step,
            handles=self.handles,
            token_ids=self.tokens,
            finished=self.finished,
            rejected=self.rejected,
            evicted=self.evicted,
            load=load,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )
        self.logprobs, self.prompt_logprobs = {}, []
        self.handles, self.tokens, self.finished, self.rejected, self.evicted = [], [], [], [], []
        return engine_pb2.EngineEvent(output=output)


def logprobs_message(found: TokenLogprobs) -> types_pb2.TokenLogprobs:
    return types_pb2.TokenLogprobs(
        logprob=found.logprob, top_ids=found.top_ids, top_logprobs=found.top_logprobs, rank=found.rank
    )


def origin_of(request: Request) -> Origin:
    origin = request.client
    assert isinstance(origin, Origin)  # this service submitted it
    return origin


def finished_message(handle: int, request: Request) -> engine_pb2.Finished:
    reason = request.finish_reason or FinishReason.ERROR
    started = request.first_scheduled
    return engine_pb2.Finished(
        handle=handle,
        reason=FINISH_REASONS[reason],
        cached_tokens=request.num_cached_tokens,
        preemptions=request.num_preempted,
        queue_s=0.0 if started is None else max(0.0, started - request.arrival),
        message=ENGINE_FAILED if reason is FinishReason.ERROR else "",
    )


def refusal(rejection: Rejection) -> tuple[grpc.StatusCode, str, int | None]:
    error = rejection.error
    if isinstance(error, QueueFull):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), int(error.retry_after_s * 1000)
    if isinstance(error, InvalidRequest):
        return grpc.StatusCode.INVALID_ARGUMENT, str(error), None
    return grpc.StatusCode.UNAVAILABLE, str(error), 1000
