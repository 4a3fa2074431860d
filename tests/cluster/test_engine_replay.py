"""Engines of a fleet over real sockets, their steps recorded, plan the same on a repeated clock."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chiron_engine.commands.replay import _replay_file
from chiron_engine.core.clocks import MonotonicClock
from chiron_engine.core.core_settings import CoreSettings
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.real_time_executor import RealTimeExecutor
from chiron_engine.core.simulated_tokens import SimulatedTokens
from chiron_engine.core.step_record import RecordedCore, StepRecord
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.iteration.autoscaler_inputs import ItlTargets
from chiron_engine.policy.iteration.plan import StepPlan
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.scheduler import Scheduler
from tests.cluster import fleet_stack
from tests.cluster.fleet_stack import COSTS, END, SHAPE, VOCABULARY, Fleet, InProcessLauncher, running_fleet

SMALL = replace(SHAPE, num_device_blocks=48, max_slots=6)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the engines of a fleet record their steps in."""

    def recorded_core(shape: ExecutorShape) -> EngineCore:
        tokens = SimulatedTokens(VOCABULARY, END, shape.max_slots)
        executor = RealTimeExecutor(shape, COSTS, MonotonicClock(), tokens)
        settings = CoreSettings(shape, "adaptive", ItlTargets(0.2, 2.0), COSTS)
        return RecordedCore(settings, executor, StepRecord(tmp_path / "steps"))

    monkeypatch.setattr(fleet_stack, "simulated_core", recorded_core)
    return tmp_path / "steps"


async def disturb(fleet: Fleet) -> None:
    """Two kinds of requests on engines too small for them; some are cancelled."""
    draw = random.Random(7)
    batch = [asyncio.create_task(fleet.generate([5, i], 120, batch=True, seed=i)) for i in range(14)]
    await asyncio.sleep(0.2)
    interactive = []
    for i in range(24):
        prompt = [7] * draw.choice((20, 100, 200)) + [i]
        interactive.append(asyncio.create_task(fleet.generate(prompt, draw.randrange(1, 60))))
        await asyncio.sleep(draw.random() * 0.06)
        if i % 6 == 5:
            interactive.pop().cancel()
    await asyncio.gather(*interactive, *batch)


def summed(results: list[dict[str, Any]], name: str) -> int:
    return sum(section[name] for result in results for section in result["sections"])


def run(config: FleetConfig, policy: str, initial: int) -> None:
    async def check() -> None:
        launcher = InProcessLauncher(shape=SMALL)
        async with running_fleet(config, policy=policy, initial=initial, launcher=launcher) as fleet:
            await fleet.wait_for(lambda: fleet.coordinator.num_ready == initial)
            await disturb(fleet)

    asyncio.run(check())


def test_every_engine_of_a_run_over_sockets_plans_the_same(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(FleetConfig(max_gpus=2, tick_s=0.1, prior_output_tokens=32.0), "static:2", 2)
    paths = sorted(records.iterdir())
    results = [_replay_file(path) for path in paths]
    assert [result["difference"] for result in results] == [None, None]
    assert summed(results, "requests") >= 34 and summed(results, "steps") > 100
    assert summed(results, "preemptions"), "nothing was evicted: the run shows too little"

    preempt = Scheduler._preempt

    def mutated(self: Scheduler, request: Request, plan: StepPlan) -> None:
        """Saves nothing of whom it evicts, and gives a slot back too many."""
        preempt(self, request, plan)
        plan.copies_out.clear()
        plan.left.append(3)

    monkeypatch.setattr(Scheduler, "_preempt", mutated)
    differences = [_replay_file(path)["difference"] for path in paths]
    assert any(differences)
    for path, difference in zip(paths, differences, strict=True):
        lines = path.read_text().splitlines()
        first = next((n for n, line in enumerate(lines, 1) if '"preempted":[' in line), None)
        assert (difference and difference["line"]) == first
