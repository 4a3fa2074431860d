"""Batches through the whole path: service, store, fleet policy, engines without a model, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.rpc.client import sampling
from chiron_engine.rpc.v1 import batch_pb2, inference_pb2, types_pb2
from tests.cluster.fleet_stack import LONG_S, Fleet, InProcessLauncher, expected, running_fleet

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
