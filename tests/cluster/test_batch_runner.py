"""Batches through the whole path: service, store, fleet policy, engines without a model, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from chiron_engine.cluster import batch_runner
from chiron_engine.cluster.batch_errors import BatchStoreFull
from chiron_engine.cluster.batch_records import NewBatch, NewLine, Progress
from chiron_engine.cluster.batch_store import BatchStore
from chiron_engine.cluster.batch_window import FIRST
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.rpc.client import sampling
from chiron_engine.rpc.v1 import batch_pb2, inference_pb2, types_pb2
from tests.cluster.fleet_stack import (
    LONG_S,
    SHAPE,
    VOCABULARY,
    Fleet,
    InProcessLauncher,
    expected,
    running_fleet,
)

CONFIG = FleetConfig(max_gpus=1, tick_s=0.1, prior_output_tokens=32.0)


def line(number: int, tokens: int, prompt: Sequence[int] | None = None, **slo: float) -> batch_pb2.BatchLine:
    """Its seed is its number, its prompt too if none is given."""
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt or [5, number]),
        sampling=sampling(temperature=0.0, max_tokens=tokens, seed=number, ignore_eos=True),
        slo=types_pb2.Slo(**slo),  # type: ignore[arg-type]
    )
    return batch_pb2.BatchLine(custom_id=f"line-{number}", request=request)


async def submit(fleet: Fleet, lines: Iterable[batch_pb2.BatchLine], **spec: object) -> batch_pb2.BatchInfo:
    return await fleet.batches.submit(batch_pb2.BatchSpec(**spec), lines, timeout=LONG_S)  # type: ignore[arg-type]


async def finished(fleet: Fleet, batch_id: str) -> batch_pb2.BatchInfo:
    async with asyncio.timeout(LONG_S):
        while not (batch := await fleet.batches.get(batch_id)).HasField("finished_at"):
            await asyncio.sleep(0.02)
    return batch


async def results(fleet: Fleet, batch_id: str) -> list[batch_pb2.LineResult]:
    return [result async for result in fleet.batches.results(batch_id)]


def in_fleet(
    directory: Path,
    scenario: Callable[[Fleet], Awaitable[None]],
    config: FleetConfig = CONFIG,
    launcher: InProcessLauncher | None = None,
) -> None:
    async def run() -> None:
        async with (
            asyncio.timeout(60),
            running_fleet(config, launcher=launcher, state_dir=directory) as fleet,
        ):
            await scenario(fleet)

    asyncio.run(run())


def check_tokens(found: Sequence[batch_pb2.LineResult], count: int, tokens: int) -> None:
    assert [result.line_no for result in found] == list(range(count))
    for result in found:
        assert result.state == batch_pb2.LINE_STATE_DONE, result
        output = result.output
        assert list(output.token_ids) == expected([5, result.line_no], tokens, seed=result.line_no)
        assert output.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert (output.usage.prompt_tokens, output.usage.completion_tokens) == (2, tokens)


def test_a_batch_is_run_and_its_results_are_kept(tmp_path: Path) -> None:
    async def scenario(fleet: Fleet) -> None:
        batch = await submit(fleet, (line(number, 20) for number in range(60)), name="sixty")
        done = await finished(fleet, batch.batch_id)
        assert (done.lines.total, done.lines.done) == (60, 60)
        check_tokens(await results(fleet, batch.batch_id), 60, 20)

    in_fleet(tmp_path, scenario)


def test_lines_beyond_the_window_wait_in_the_store_and_urgent_ones_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "WINDOW_LINES", 8)
    monkeypatch.setattr(batch_runner, "PAGE_LINES", 5)

    async def scenario(fleet: Fleet) -> None:
        slow = await submit(fleet, (line(number, 60) for number in range(100)), completion_window_s=7200.0)
        urgent = await submit(fleet, (line(number, 60) for number in range(30)), completion_window_s=60.0)
        assert fleet.coordinator.fleet is not None
        assert len(fleet.coordinator.fleet.dispatcher.tracked) <= 2 * 8 + SHAPE.max_slots
        done = await finished(fleet, urgent.batch_id)
        rest = await fleet.batches.get(slow.batch_id)
        assert rest.lines.done < 80
        assert done.lines.done == 30
        assert (await finished(fleet, slow.batch_id)).lines.done == 100
        check_tokens(await results(fleet, slow.batch_id), 100, 60)
        check_tokens(await results(fleet, urgent.batch_id), 30, 60)
        assert not fleet.coordinator.fleet.dispatcher.tracked

    in_fleet(tmp_path, scenario)


def test_cancelling_ends_waiting_lines_at_once_and_running_ones_soon(tmp_path: Path) -> None:
    async def scenario(fleet: Fleet) -> None:
        batch = await submit(fleet, (line(number, 1500) for number in range(60)))
        await fleet.wait_for(lambda: fleet.coordinator.roster.engines[0].streams)
        other = await submit(fleet, (line(number, 5) for number in range(3)))
        cancelled = await fleet.batches.cancel(batch.batch_id)
        assert cancelled.lines.cancelled > 30
        done = await finished(fleet, batch.batch_id)
        assert done.status == batch_pb2.BATCH_STATUS_CANCELLED
        assert done.lines.cancelled == 60
        codes = {result.error.code for result in await results(fleet, batch.batch_id)}
        assert codes == {"batch_cancelled"}
        await finished(fleet, other.batch_id)  # there is room again
        check_tokens(await results(fleet, other.batch_id), 3, 5)
        await fleet.wait_for(lambda: not fleet.coordinator.roster.engines[0].streams)
        assert fleet.coordinator.fleet is not None
        assert not fleet.coordinator.fleet.dispatcher.tracked

    in_fleet(tmp_path, scenario)


def test_lines_that_are_not_done_in_time_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "CHECKPOINT_S", 0.1)

    async def scenario(fleet: Fleet) -> None:
        lines = [line(0, 5), *(line(number, 1500) for number in range(1, 30))]
        batch = await submit(fleet, lines, expire_after_s=1.0)
        done = await finished(fleet, batch.batch_id)
        assert done.status == batch_pb2.BATCH_STATUS_EXPIRED
        assert (done.lines.done, done.lines.expired) == (1, 29)
        check_tokens((await results(fleet, batch.batch_id))[:1], 1, 5)

    in_fleet(tmp_path, scenario)


def test_what_cannot_be_run_is_refused_whole(tmp_path: Path) -> None:
    too_long = line(1, 3000)
    other_token = line(1, 5, [VOCABULARY])
    interactive = line(1, 5)
    interactive.request.slo.slo_class = types_pb2.SLO_CLASS_INTERACTIVE

    async def scenario(fleet: Fleet) -> None:
        for bad, words in (
            (line(1, 5, deadline_s=-5.0), "deadline_s is -5"),
            (line(1, 5, ttft_slo_ms=-1.0), "ttft_slo_ms is -1"),
            (too_long, "context holds 2048"),
            (other_token, "vocabulary"),
            (interactive, "class batch"),
            (line(0, 5), "same custom_id"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=words) as error:
                await submit(fleet, [line(0, 5), bad])
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not (await fleet.batches.list()).batches

    in_fleet(tmp_path, scenario)


def test_sent_twice_it_is_run_once(tmp_path: Path) -> None:
    async def scenario(fleet: Fleet) -> None:
        lines = [line(number, 30) for number in range(10)]
        first, second = await asyncio.gather(
            submit(fleet, lines, batch_id="b"), submit(fleet, lines, batch_id="b")
        )
        assert first.created == second.created
        assert (await finished(fleet, "b")).lines.done == 10
        assert (await submit(fleet, lines, batch_id="b")).lines.done == 10
        check_tokens(await results(fleet, "b"), 10, 30)

    in_fleet(tmp_path, scenario)


def test_interactive_requests_evict_lines_which_go_on_with_their_tokens(tmp_path: Path) -> None:
    launcher = InProcessLauncher(shape=replace(SHAPE, num_device_blocks=40, max_slots=4))

    async def scenario(fleet: Fleet) -> None:
        batch = await submit(fleet, (line(number, 200) for number in range(12)))
        await fleet.wait_for(lambda: len(fleet.coordinator.roster.engines[0].streams) >= 3)
        await asyncio.sleep(0.3)
        prompts = [[7] * 100 + [number] for number in range(4)]
        answering = [asyncio.create_task(fleet.generate(prompt, 150)) for prompt in prompts]
        evicted = 0
        while not all(task.done() for task in answering):
            evicted = max(evicted, (await fleet.batches.get(batch.batch_id)).lines.evicted)
            await asyncio.sleep(0.02)
        assert evicted
        for prompt, task in zip(prompts, answering, strict=True):
            assert await task == expected(prompt, 150)
        assert (await finished(fleet, batch.batch_id)).lines.done == 12
        check_tokens(await results(fleet, batch.batch_id), 12, 200)

    in_fleet(tmp_path, scenario, launcher=launcher)


def test_evicted_lines_can_be_cancelled(tmp_path: Path) -> None:
    launcher = InProcessLauncher(shape=replace(SHAPE, num_device_blocks=40, max_slots=4))

    async def scenario(fleet: Fleet) -> None:
        batch = await submit(fleet, (line(number, 400) for number in range(4)))
        await fleet.wait_for(lambda: len(fleet.coordinator.roster.engines[0].streams) >= 3)
        await asyncio.sleep(0.3)
        prompts = [[7] * 100 + [number] for number in range(4)]
        answering = [asyncio.create_task(fleet.generate(prompt, 100)) for prompt in prompts]
        while not (await fleet.batches.get(batch.batch_id)).lines.evicted:
            await asyncio.sleep(0.01)
        await fleet.batches.cancel(batch.batch_id)
        assert (await finished(fleet, batch.batch_id)).lines.cancelled == 4
        for prompt, answer in zip(prompts, await asyncio.gather(*answering), strict=True):
            assert answer == expected(prompt, 100)
        assert fleet.coordinator.fleet is not None
        assert not fleet.coordinator.fleet.dispatcher.tracked

    in_fleet(tmp_path, scenario, launcher=launcher)


def test_a_server_that_is_stopped_goes_on_later_with_the_tokens_it_had(tmp_path: Path) -> None:
    """The second life starts no line anew: those that ran bring their tokens."""

    async def begin(fleet: Fleet) -> None:
        await submit(fleet, (line(number, 400) for number in range(20)), batch_id="b")
        await fleet.wait_for(lambda: fleet.coordinator.roster.engines[0].streams)
        await asyncio.sleep(0.5)

    in_fleet(tmp_path, begin)
    with BatchStore(tmp_path) as store:
        kept = [pending.produced for pending in store.waiting(FIRST, 100)]
    assert len(kept) == 20
    assert len([produced for produced in kept if produced > 5]) >= SHAPE.max_slots // 2

    async def end(fleet: Fleet) -> None:
        assert (await finished(fleet, "b")).lines.done == 20
        check_tokens(await results(fleet, "b"), 20, 400)

    in_fleet(tmp_path, end)


def test_a_line_whose_tokens_are_all_there_needs_no_engine(tmp_path: Path) -> None:
    """Its coordinator was killed between its last token and its result."""

    async def begin(fleet: Fleet) -> None:
        await submit(fleet, [line(0, 30), line(1, 30)], batch_id="b")
        await finished(fleet, "b")

    in_fleet(tmp_path / "first", begin)
    with BatchStore(tmp_path / "first") as store, BatchStore(tmp_path / "second") as other:
        batch, requests = store.get("b"), store._all("SELECT message FROM request ORDER BY line_id")
        lines = [NewLine(f"line-{n}", raw, 2, 30, 3600.0, 2.0) for n, (raw,) in enumerate(requests)]
        submitted = other.submit(NewBatch("b"), lines, batch.created)
        first, second = other.claim([pending.line_id for pending in submitted.lines], batch.created)
        other.checkpoint([Progress(first.line_id, first.attempt, expected([5, 0], 30, seed=0))])
        other.checkpoint([Progress(second.line_id, second.attempt, expected([5, 1], 29, seed=1))])

    async def end(fleet: Fleet) -> None:
        assert (await finished(fleet, "b")).lines.done == 2
        check_tokens(await results(fleet, "b"), 2, 30)
        assert fleet.coordinator.fleet is not None
        assert not fleet.coordinator.fleet.dispatcher.tracked

    in_fleet(tmp_path / "second", end)


def test_engines_that_are_lost_cost_no_line(tmp_path: Path) -> None:
    config = replace(CONFIG, max_gpus=2, min_instances=2)

    async def scenario(fleet: Fleet) -> None:
        batch = await submit(fleet, (line(number, 150) for number in range(60)))
        for instance_id in (0, 1):
            await fleet.wait_for(
                lambda found=instance_id: any(
                    len(engine.streams) >= 2
                    for engine in fleet.coordinator.roster.engines.values()
                    if engine.instance_id >= found
                )
            )
            await asyncio.sleep(0.1)
            await fleet.launcher.stop(instance_id, 0.0)
        assert (await finished(fleet, batch.batch_id)).lines.done == 60
        check_tokens(await results(fleet, batch.batch_id), 60, 150)

    in_fleet(tmp_path, scenario, config)


def test_a_disk_that_is_full_for_a_while_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every commit fails for a while, in the middle of the batch."""
    monkeypatch.setattr(batch_runner, "RETRY_S", 0.1)
    monkeypatch.setattr(batch_runner, "CHECKPOINT_S", 0.1)
    is_full = False
    whole = BatchStore.transaction

    @contextmanager
    def transaction(store: BatchStore) -> Iterator[None]:
        with whole(store):
            yield
            if is_full:
                raise BatchStoreFull("the disk of the batch store is full")

    monkeypatch.setattr(BatchStore, "transaction", transaction)

    async def scenario(fleet: Fleet) -> None:
        nonlocal is_full
        batch = await submit(fleet, (line(number, 30) for number in range(60)))
        await fleet.wait_for(lambda: fleet.coordinator.roster.engines[0].streams)
        is_full = True
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await submit(fleet, [line(0, 5)])
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await asyncio.sleep(1.0)
        is_full = False
        assert (await fleet.batches.get(batch.batch_id)).lines.done < 60
        assert (await finished(fleet, batch.batch_id)).lines.done == 60
        check_tokens(await results(fleet, batch.batch_id), 60, 30)

    in_fleet(tmp_path, scenario)
    messages = [record.message for record in caplog.records if "disk" in record.message]
    assert len(messages) == 1, messages  # said once, however often it was tried
