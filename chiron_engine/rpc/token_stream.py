"""The tokens of one request, wherever they are computed: one attempt on an engine after another."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from .errors import RpcFailure, invalid_argument, unavailable
from .v1 import engine_pb2, types_pb2

# Tokens that may wait for a client that does not read: some 64 KiB of text.
MAX_PENDING_TOKENS = 1 << 14

MOST_VAIN_LOSSES = 3
"""Engines that end by themselves, one after another, with a request and without a token of it in between,
before it is taken for the cause: what brings an engine down does so again where it goes on."""
MOST_LOSSES = 10
"""Of engines in all: a request may bring them down later, or have them killed for their memory."""

INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT.value[0]


@dataclass(slots=True)
class TokenTimes:
    """Arrival times at the gateway, on `time.monotonic`. Tokens of one message share one arrival.
    gaps: seconds between a token and the next."""

    first: float = 0.0
    last: float = 0.0
    count: int = 0
    gaps: array[float] = field(default_factory=lambda: array("f"))

    @property
    def longest_gap(self) -> float:
        return max(self.gaps, default=0.0)

    def add(self, now: float) -> None:
        if self.count == 0:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now
        self.count += 1


class Attempt(Protocol):
    """A stay on one engine, to be ended from here."""

    def abort(self, handle: int) -> None: ...

    def abandon(self, handle: int) -> None:
        """End it without the engine's word; its stream hears nothing more of it."""
        ...

    def take_back(self, handle: int) -> None:
        """`abandon`, where its stream is evicted at once."""
        ...


class StreamOwner(Protocol):
    """Chooses engines for streams. Called on the event loop of the stream."""

    def paused(self, stream: TokenStream) -> None:
        """It waits for another engine: `stream.pause` says why."""
        ...

    def ended(self, stream: TokenStream) -> None:
        """Called once, after which the stream asks for nothing more."""
        ...


@dataclass(frozen=True, slots=True)
class Pause:
    """Why an attempt ended before its request. saved_tokens: KV that the engine keeps of an evicted
    one. Exactly one of the three kinds: evicted, refused (`rejected`), or the engine is gone."""

    evicted: bool = False
    saved_tokens: int = 0
    rejected: engine_pb2.Rejected | None = None


class TokenStream:
    """Holds the prompt and all tokens so far, so that losing an engine loses nothing: the owner starts
    another attempt, which goes on where the last one stopped (equal seeds and positions draw equal
    tokens). Exactly one of `finished` and `failure` is set when it has ended.

    key: its name over all its attempts, given by the owner. num_attempts: started so far. num_losses:
    engines that ended with it. num_vain_losses: the last of those that ended by themselves, with no token
    of it in between.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        sampling: types_pb2.SamplingParams,
        slo: types_pb2.Slo,
        request_id: str,
        owner: StreamOwner,
        *,
        tokens: Iterable[int] = (),
        max_pending: int | None = MAX_PENDING_TOKENS,
    ) -> None:
        """tokens: those it has already, of a stream before this one. max_pending: tokens that may wait to
        be read before the request is aborted; None where nobody needs to read them."""
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.slo = slo
        self.request_id = request_id
        self.key = 0
        self.tokens = array("I", tokens)
        self.asks_logprobs = sampling.HasField("logprobs")
        self.logprobs: list[types_pb2.TokenLogprobs] = []
        """Of each token, where they are asked for."""
        self.prompt_logprobs: list[types_pb2.TokenLogprobs] = []
        """Of the prompt's but the first; they come with the first token."""
        self.times = TokenTimes()
        self.finished: engine_pb2.Finished | None = None
        self.failure: RpcFailure | None = None
        self.pause: Pause | None = None
        self.overflowed = False
        self.is_aborted = False
        self.num_attempts = 0
        self.num_evictions = 0
        self.gave_way = 0
        """How often it gave way to others, as its owner counts; an engine evicts it only so many times."""
        self.num_losses = 0
        self.num_vain_losses = 0
        self._tokens_at_loss = -1
        self._owner = owner
        self._attempt: Attempt | None = None
        self._handle = 0
        self._read = 0
        self._max_pending = max_pending
        self._ready = asyncio.Event()
        if self.tokens:
            self._ready.set()

    @property
    def has_ended(self) -> bool:
        return self.finished is not None or self.failure is not None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens)

    @property
    def is_running(self) -> bool:
        return self._attempt is not None

    async def next(self) -> array[int]:
        """The tokens that came since the last call, waiting for some unless the stream has ended
        (then possibly none)."""
        await self._ready.wait()
        if not self.has_ended:
            self._ready.clear()
        tokens = self.tokens[self._read :]
        self._read += len(tokens)
        return tokens

    async def wait_ended(self) -> None:
        while not self.has_ended:
            await self.next()

    def abort(self) -> None:
        """End the request: at once where no engine has it, else when the engine says so."""
        if self.has_ended or self.is_aborted:
            return
        self.is_aborted = True
        if self._attempt is not None:
            self._attempt.abort(self._handle)
        else:
            self.finish(engine_pb2.Finished(reason=types_pb2.FINISH_REASON_ABORT))

    # For the owner.

    def move(self) -> None:
        """End the attempt under way, if there is one: the request goes on elsewhere with its tokens."""
        if self._attempt is not None:
            self._attempt.take_back(self._handle)

    def end_of(self, hello: engine_pb2.Hello) -> types_pb2.FinishReason | None:
        """Whether the tokens so far are all there will be: the engine may have gone before it could
        say so."""
        if not self.tokens:
            return None
        stops = set(self.sampling.stop_token_ids)
        if not self.sampling.ignore_eos:
            stops.update(hello.eos_token_ids)
        if self.tokens[-1] in stops:
            return types_pb2.FINISH_REASON_STOP
        full = len(self.prompt_ids) + len(self.tokens) >= hello.max_model_len
        if full or len(self.tokens) >= (self.sampling.max_tokens or hello.max_model_len):
            return types_pb2.FINISH_REASON_LENGTH
        return None

    def submission(self, attempt: Attempt, handle: int) -> engine_pb2.Submit:
        """Begin another attempt, as `handle` of `attempt`: the message that starts it."""
        self._attempt, self._handle = attempt, handle
        self.pause = None
        self.num_attempts += 1
        submit = engine_pb2.Submit(
            handle=handle,
            prompt_token_ids=self.prompt_ids,
            sampling=self.sampling,
            slo=self.slo,
            request_id=self.request_id,
            key=self.key,
            evictions=self.gave_way,
        )
        if self.tokens:
            submit.prompt_token_ids.extend(self.tokens)
            submit.prior_outputs = len(self.tokens)
            submit.sampling.ClearField("prompt_logprobs")
            if self.sampling.HasField("max_tokens"):
                submit.sampling.max_tokens = self.sampling.max_tokens - len(self.tokens)
            submit.sampling.min_tokens = max(0, self.sampling.min_tokens - len(self.tokens))
        return submit

    def finish_if_over(self, hello: engine_pb2.Hello) -> bool:
        """Whether it has ended, or does now: its engine may have gone before it said that this was all."""
        if not self.has_ended and (reason := self.end_of(hello)) is not None:
            self.finish(engine_pb2.Finished(reason=reason))
        return self.has_ended

    def engine_ended(self, hello: engine_pb2.Hello, was_killed: bool) -> None:
        """The engine where it was is no more; losing only the connection is not that. The stream goes on
        elsewhere, unless it is over or has ended too many engines. was_killed: from outside, which tells
        nothing about this request."""
        if self.finish_if_over(hello):
            return
        self.num_losses += 1
        if not was_killed:
            came = len(self.tokens) > self._tokens_at_loss >= 0
            self.num_vain_losses = 1 if came else self.num_vain_losses + 1
            self._tokens_at_loss = len(self.tokens)
        if self.num_vain_losses >= MOST_VAIN_LOSSES or self.num_losses >= MOST_LOSSES:
            self.fail(unavailable("every engine that served this request was lost", "engine_lost"))

    def fail(self, failure: RpcFailure) -> None:
        """No engine goes on with it, also where one runs it; the client is told why."""
        if self._attempt is not None:
            self._attempt.abandon(self._handle)
        self.failure = failure
        self._end()

    # For the attempt.

    def push(self, token: int, now: float) -> None:
        self.times.add(now)
        self.tokens.append(token)
        most = self._max_pending
        if most is not None and len(self.tokens) - self._read > most and not self.overflowed:
            self.overflowed = True
            self.abort()
        self._ready.set()

    def finish(self, finished: engine_pb2.Finished) -> None:
        self.finished = finished
        self._end()

    def evict(self, evicted: engine_pb2.Evicted) -> None:
        self.num_evictions += 1
        self._pause(Pause(evicted=True, saved_tokens=evicted.saved_tokens))

    def reject(self, rejected: engine_pb2.Rejected) -> None:
        """Final where the request itself is at fault."""
        if rejected.code == INVALID_ARGUMENT:
            self.fail(invalid_argument(rejected.message))
        else:
            self._pause(Pause(rejected=rejected))

    def lose(self) -> None:
        """The engine, or the connection to it, is gone."""
        self._pause(Pause())

    def _pause(self, pause: Pause) -> None:
        self._attempt = None
        if self.is_aborted:
            self.finish(engine_pb2.Finished(reason=types_pb2.FINISH_REASON_ABORT))
            return
        self.pause = pause
        self._owner.paused(self)

    def _end(self) -> None:
        self._attempt = None
        self._ready.set()
        self._owner.ended(self)
