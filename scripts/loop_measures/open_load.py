"""Requests sent at their times whatever comes back, through a server or straight to one engine."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import grpc.aio

from chiron_engine.rpc.client import CoordinatorClient, EngineClient, InferenceClient, sampling
from chiron_engine.rpc.v1 import coordinator_pb2, engine_pb2, inference_pb2, types_pb2

KINDS = 32
"""Different requests: answers to equal ones must be equal."""
READY_S = 120.0
ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for `tokens` tokens. Two of a kind have the same prompt and seed."""

    kind: int
    tokens: int
    prompt_tokens: int = 32

    @property
    def prompt(self) -> list[int]:
        return [(97 * i + 31 * self.kind) % 49_000 + 20 for i in range(self.prompt_tokens)]

    @property
    def sampling(self) -> types_pb2.SamplingParams:
        return sampling(max_tokens=self.tokens, seed=self.kind, ignore_eos=True)


@dataclass(slots=True)
class Answer:
    """Times on `time.monotonic`. error: empty where all went well."""

    ask: Ask
    due: float
    sent: float = 0.0
    first: float = 0.0
    tokens: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.first - self.sent


class Target(Protocol):
    def stream(self, ask: Ask) -> AsyncIterator[Sequence[int]]:
        """Tokens as they come."""
        ...


class ThroughServer:
    def __init__(self, client: InferenceClient) -> None:
        self._client = client

    async def stream(self, ask: Ask) -> AsyncIterator[Sequence[int]]:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=ask.prompt), sampling=ask.sampling
        )
        async for chunk in self._client.generate(request):
            yield chunk.token_ids


class StraightToEngine:
    """One Connect stream, as a gateway has it; a context manager."""

    def __init__(self, address: str) -> None:
        self._client = EngineClient(address)
        self._handles = itertools.count(1)
        self._queues: dict[int, asyncio.Queue[Sequence[int] | None]] = {}
        self._writing = asyncio.Lock()

    async def __aenter__(self) -> StraightToEngine:
        self._call = self._client.connect()
        await self._call.read()  # its Hello
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        self._call.cancel()
        with suppress(asyncio.CancelledError):
            await self._reader
        await self._client.close()

    async def stream(self, ask: Ask) -> AsyncIterator[Sequence[int]]:
        handle = next(self._handles)
        queue = self._queues[handle] = asyncio.Queue()
        submit = engine_pb2.Submit(handle=handle, prompt_token_ids=ask.prompt, sampling=ask.sampling)
        async with self._writing:  # a call takes one write at a time
            await self._call.write(engine_pb2.EngineCommand(submits=[submit]))
        while (tokens := await queue.get()) is not None:
            yield tokens

    async def _read(self) -> None:
        while (event := await self._call.read()) is not grpc.aio.EOF:
            output = event.output
            for handle, token in zip(output.handles, output.token_ids, strict=True):
                self._queues[handle].put_nowait((token,))
            for end in (*output.finished, *output.rejected):
                self._queues.pop(end.handle).put_nowait(None)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Poisson arrivals, in seconds from the start."""
    rng = random.Random(seed)
    times, now = [], rng.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += rng.expovariate(rate)
    return times


async def send(target: Target, times: Sequence[float], tokens: int) -> list[Answer]:
    """Send a request at each of the times, and wait for all answers."""
    began = time.monotonic() + 0.05
    answers = [Answer(Ask(i % KINDS, tokens), began + at) for i, at in enumerate(times)]
    async with asyncio.TaskGroup() as group:
        for answer in answers:
            await asyncio.sleep(max(0.0, answer.due - time.monotonic()))
            group.create_task(_fill(answer, target))
    return answers


async def _fill(answer: Answer, target: Target) -> None:
    answer.sent = time.monotonic()
    try:
        async with asyncio.timeout(ANSWER_S):
            async for tokens in target.stream(answer.ask):
                if tokens and not answer.tokens:
                    answer.first = time.monotonic()
                answer.tokens.extend(tokens)
    except TimeoutError:
        answer.error = f"no end within {ANSWER_S:g} s"
    except grpc.aio.AioRpcError as error:
        answer.error = f"{error.code().name}: {error.details()}"


async def references(target: Target, tokens: int) -> dict[int, list[int]]:
    """The right answer to each kind of request, from runs of their own."""
    answers = await send(target, [0.02 * i for i in range(KINDS)], tokens)
    if failed := [answer.error for answer in answers if answer.error]:
        raise RuntimeError(f"a request that was alone failed: {failed[0]}")
    return {answer.ask.kind: answer.tokens for answer in answers}


@dataclass(frozen=True, slots=True)
class Wrong:
    """Requests: lost ones had no answer or too few tokens, doubled ones too many, `other` others."""

    lost: int
    doubled: int
    other: int

    @property
    def total(self) -> int:
        return self.lost + self.doubled + self.other


def compare(answers: Sequence[Answer], right: dict[int, list[int]]) -> Wrong:
    lost = doubled = other = 0
    for answer in answers:
        if answer.error or len(answer.tokens) < answer.ask.tokens:
            lost += 1
        elif len(answer.tokens) > answer.ask.tokens:
            doubled += 1
        elif answer.tokens != right[answer.ask.kind]:
            other += 1
    return Wrong(lost, doubled, other)


async def wait_fleet(address: str, count: int) -> list[coordinator_pb2.Instance]:
    """Instances, once so many are ready. Raises TimeoutError."""
    async with CoordinatorClient(address) as client, asyncio.timeout(READY_S):
        while True:
            instances = [i for i in (await client.fleet()).instances if i.state == "ready"]
            if len(instances) >= count:
                return instances
            await asyncio.sleep(0.1)
