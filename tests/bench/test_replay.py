"""Replays against a gateway over a real socket, whose engine has no model; and against made-up answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from chiron_engine.bench.prompts import PromptSource
from chiron_engine.bench.replay import Replay
from chiron_engine.bench.request_log import SHORT_OUTPUT, RequestLog
from chiron_engine.rpc.client import InferenceClient
from chiron_engine.rpc.v1 import inference_pb2, types_pb2
from chiron_engine.sim.run_result import Outcome
from chiron_engine.sim.workload import Workload
from tests.bench.recorded_runs import trace, workload
from tests.gateway.serving_stack import SHAPE, serving, slow_executor
from tests.gateway.tiny_model import END, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bench") / "model")


def prompts() -> PromptSource:
    return PromptSource(SHAPE.vocab_size, [END], 0)


async def replayed(
    client: InferenceClient, asked: Workload, timeout_s: float | None = None
) -> tuple[RequestLog, bool]:
    replay = Replay(client, asked, prompts(), timeout_s)
    async with asyncio.timeout(30):
        completed = await replay.run(asyncio.Event())
    assert replay.in_flight == 0
    return replay.log, completed


def even(count: int, gap_s: float, prompt: int = 20, output: int = 4) -> Workload:
    return workload(trace([gap_s * row for row in range(count)], [prompt] * count, [output] * count))


def test_every_request_is_served_with_its_lengths(model: Path) -> None:
    asked = workload(
        trace([0.0, 0.02, 0.04], [5, 100, 30], [1, 20, 7]), trace([0.0, 0.01], [50, 60], [3, 40])
    )

    async def run() -> tuple[RequestLog, bool]:
        async with serving(model, partial(slow_executor, 0.002)) as (client, _):
            return await replayed(client, asked)

    log, completed = asyncio.run(run())
    assert completed
    assert log.outcome.tolist() == [Outcome.FINISHED] * 5
    assert log.output_tokens.tolist() == [1, 20, 7, 3, 40]
    assert sum(log.chunk_tokens) == 71
    assert log.errors == {}
    assert log.due_s.tolist() == [0.0, 0.02, 0.04, 0.0, 0.01]
    assert np.all(np.asarray(log.sent_s) >= np.asarray(log.due_s))
    assert np.all(np.diff(log.chunk_s) >= 0)


def test_a_slow_server_delays_no_request(model: Path) -> None:
    """Open loop: all are sent before any has ended."""

    async def run() -> tuple[RequestLog, bool]:
        async with serving(model, partial(slow_executor, 0.4)) as (client, _):
            return await replayed(client, even(20, 0.02))

    log, _ = asyncio.run(run())
    assert max(log.sent_s) < min(log.ended_s)


def test_refusals_are_counted_apart_from_losses(model: Path) -> None:
    async def run() -> tuple[RequestLog, bool]:
        async with serving(model, partial(slow_executor, 0.2), max_queued_requests=1) as (client, _):
            return await replayed(client, even(6, 0.0))

    log, _ = asyncio.run(run())
    rejected = log.outcome.tolist().count(Outcome.REJECTED)
    assert 1 <= rejected <= 5
    assert log.errors == {"RESOURCE_EXHAUSTED rate_limit_exceeded": rejected}
    assert log.outcome.tolist().count(Outcome.FINISHED) == 6 - rejected


def test_a_request_over_its_time_is_given_up_and_lost(model: Path) -> None:
    async def run() -> tuple[RequestLog, bool]:
        async with serving(model, partial(slow_executor, 0.1)) as (client, engine):
            log, completed = await replayed(client, even(2, 0.0, output=900), timeout_s=0.5)
            await engine.wait_idle(5.0)
            return log, completed

    log, completed = asyncio.run(run())
    assert completed
    assert log.outcome.tolist() == [Outcome.UNFINISHED] * 2
    assert sum(log.errors.values()) == 2
    # Told by whichever side sees it first; the server's says which case.
    assert {error.split()[0] for error in log.errors} == {"DEADLINE_EXCEEDED"}


def test_equal_prefix_blocks_are_found_in_the_cache(model: Path) -> None:
    shared = trace(
        [0.0, 0.5], [80, 80], [2, 2], prefix_blocks=[[7, 8, 9], [7, 8, 10]], prefix_block_tokens=32
    )
    asked = workload(shared)

    async def run() -> tuple[RequestLog, bool]:
        async with serving(model, partial(slow_executor, 0.002)) as (client, _):
            return await replayed(client, asked)

    log, _ = asyncio.run(run())
    assert log.cached_tokens.tolist() == [0, 64]


def test_a_stop_cancels_what_runs_and_keeps_what_was(model: Path) -> None:
    async def run() -> tuple[RequestLog, bool]:
        async with serving(model, partial(slow_executor, 0.05)) as (client, engine):
            first = workload(trace([0.0, 0.0, 60.0], [20] * 3, [2, 900, 2]))
            replay, stop = Replay(client, first, prompts()), asyncio.Event()
            running = asyncio.create_task(replay.run(stop))
            async with asyncio.timeout(20):
                while replay.log.outcome[0] != Outcome.FINISHED:
                    await asyncio.sleep(0.01)
            stop.set()
            completed = await running
            await engine.wait_idle(5.0)
            return replay.log, completed

    log, completed = asyncio.run(run())
    assert not completed
    assert log.outcome.tolist() == [Outcome.FINISHED, Outcome.UNFINISHED, Outcome.UNFINISHED]
    assert np.isnan(log.sent_s).tolist() == [False, False, True]
    assert np.isnan(log.ended_s).tolist() == [False, True, True]


def answering(*chunks: inference_pb2.GenerateChunk) -> InferenceClient:
    async def generate(
        request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        for chunk in chunks:
            yield chunk

    return SimpleNamespace(stub=SimpleNamespace(Generate=generate))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("reason", "tokens", "error"),
    [
        (types_pb2.FINISH_REASON_LENGTH, 3, SHORT_OUTPUT),
        (types_pb2.FINISH_REASON_LENGTH, 5, SHORT_OUTPUT),
        (types_pb2.FINISH_REASON_STOP, 4, "ended with FINISH_REASON_STOP"),
        (types_pb2.FINISH_REASON_UNSPECIFIED, 4, "ended with FINISH_REASON_UNSPECIFIED"),
    ],
)
def test_an_output_that_is_not_the_one_asked_for_is_lost(reason: int, tokens: int, error: str) -> None:
    chunk = inference_pb2.GenerateChunk(token_ids=[1] * tokens, finish_reason=reason)
    log, _ = asyncio.run(replayed(answering(chunk), even(1, 0.0)))
    assert log.outcome.tolist() == [Outcome.UNFINISHED]
    assert log.errors == {error: 1}


def test_what_is_sent_says_class_objectives_and_lengths() -> None:
    seen: list[inference_pb2.GenerateRequest] = []

    async def generate(
        request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        seen.append(request)
        yield inference_pb2.GenerateChunk(token_ids=[1], finish_reason=types_pb2.FINISH_REASON_LENGTH)

    client = SimpleNamespace(stub=SimpleNamespace(Generate=generate))
    asked = workload(trace([0.0], [9], [1]), trace([0.01], [11], [1]))
    asyncio.run(replayed(client, asked))  # type: ignore[arg-type]
    interactive, batch = seen
    assert [len(request.token_ids.ids) for request in seen] == [9, 11]
    assert interactive.slo.slo_class == types_pb2.SLO_CLASS_INTERACTIVE
    assert (interactive.slo.ttft_slo_ms, interactive.slo.itl_slo_ms) == (1000.0, 100.0)
    assert not interactive.slo.HasField("deadline_s")
    assert batch.slo.slo_class == types_pb2.SLO_CLASS_BATCH
    assert batch.slo.deadline_s == 2.0
    assert all(r.sampling.ignore_eos and r.sampling.max_tokens == 1 for r in seen)


def test_a_mistake_of_its_own_ends_the_run() -> None:
    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(replayed(answering(None), even(3, 0.0)))  # type: ignore[arg-type]
    assert raised.group_contains(AttributeError)
