"""Profiles and workloads small enough for hundreds of simulations a minute."""

from __future__ import annotations

from array import array
from random import Random

from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.sim.linear_step_times import LinearStepTimes
from chiron_engine.sim.profile import Profile
from chiron_engine.sim.run_result import RunResult
from chiron_engine.sim.sim_policy import SimPolicy
from chiron_engine.sim.traces.trace import Trace
from chiron_engine.sim.workload import ClassSlo, Workload, make_workload
from chiron_engine.sim.world import World
from chiron_engine.sim.world_settings import WorldSettings

COSTS = StepCosts(0.01, 2e-4, 1e-6, 5e-5, 1e-9)
INTERACTIVE_SLO = ClassSlo(ttft_s=2.0, itl_s=0.05)
BATCH_SLO = ClassSlo(ttft_s=600.0, itl_s=1.0)


def small_profile(kv_tokens: int = 8192, slots: int = 16) -> Profile:
    return Profile(
        name="test/small/tp1/bf16",
        gpus=1,
        kv_capacity_tokens=kv_tokens,
        kv_bytes_per_token=1024,
        max_slots=slots,
        max_step_tokens=512,
        max_model_len=4096,
        step_times=LinearStepTimes(COSTS),
        fit=COSTS,
        envelope=COSTS,
        copy_s_per_kv_token=1e-6,
        source="made up",
    )


def random_trace(
    seed: int, requests: int, span_s: float, prompt: int = 200, output: int = 40, name: str = "random"
) -> Trace:
    """Uniform arrivals, lengths uniform up to twice the mean."""
    dice = Random(f"{name} {seed}")
    return Trace(
        name,
        array("d", sorted(dice.uniform(0.0, span_s) for _ in range(requests))),
        array("i", [dice.randint(1, 2 * prompt) for _ in range(requests)]),
        array("i", [dice.randint(1, 2 * output) for _ in range(requests)]),
    )


def trace_of(*rows: tuple[float, int, int]) -> Trace:
    """(arrival, prompt tokens, output tokens) of each request."""
    return Trace(
        "rows",
        array("d", [row[0] for row in rows]),
        array("i", [row[1] for row in rows]),
        array("i", [row[2] for row in rows]),
    )


def mixed_workload(seed: int, interactive: int = 60, batch: int = 40, span_s: float = 30.0) -> Workload:
    return make_workload(
        random_trace(seed, interactive, span_s, name="interactive"),
        random_trace(seed, batch, span_s / 2, prompt=300, output=80, name="batch"),
        INTERACTIVE_SLO,
        BATCH_SLO,
    )


def small_settings(**changes: object) -> WorldSettings:
    values: dict = {"load_time_s": 4.0, "initial_instances": 1, "max_gpus": 8, "block_size": 16}
    return WorldSettings(**{**values, **changes})


def small_run(
    workload: Workload, policy: SimPolicy, profile: Profile | None = None, seed: int = 0, **changes: object
) -> RunResult:
    return World(workload, profile or small_profile(), policy, small_settings(**changes), seed).run()
