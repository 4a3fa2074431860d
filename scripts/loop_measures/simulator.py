"""The same trace, profile and settings through processes and through the simulator."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chiron_engine.bench.measured import measure as measure_replay
from chiron_engine.bench.prompts import PromptSource
from chiron_engine.bench.replay import Replay
from chiron_engine.commands.simulation import load_workload, run_policies
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.rpc.client import CoordinatorClient, InferenceClient
from chiron_engine.rpc.v1 import coordinator_pb2
from chiron_engine.sim.linear_step_times import LinearStepTimes, StepRegion
from chiron_engine.sim.profile import Profile
from chiron_engine.sim.profile_file import write_linear_profile
from chiron_engine.sim.run_result import RunResult
from chiron_engine.sim.summary import slo_figures
from chiron_engine.sim.workload import BATCH_SLO, INTERACTIVE_SLO, ClassSlo, Workload
from chiron_engine.sim.world_settings import WorldSettings

from .measured import Measured, Options
from .open_load import wait_fleet
from .processes import Server, serving

SECONDS = 180.0
RATE, FACTOR, BURST_AT_S, BURST_S = 4.0, 3.0, 60.0, 30.0
BATCH_REQUESTS, BATCH_DUE_S = 150, 120.0
LENGTHS, OUTPUT_TOKENS = "128/64", 64
MOST_ENGINES = 8
BLOCK_SIZE = 64
LOOK_S = 0.25
SKEW_S = 2.0
COSTS = StepCosts(0.03, 1e-3, 0.0, 1e-4)
SLOS = (ClassSlo(5.0, INTERACTIVE_SLO.itl_s), ClassSlo(BATCH_SLO.ttft_s, BATCH_SLO.itl_s, BATCH_DUE_S))


@dataclass(slots=True)
class Counts:
    """How many instances there were, loading and draining ones included, by time in seconds."""

    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, time_s: float, count: int) -> None:
        self.times.append(time_s)
        self.counts.append(count)

    def at(self, time_s: float) -> int:
        return self.counts[max(0, bisect_right(self.times, time_s) - 1)]

    def within(self, start_s: float, end_s: float) -> list[int]:
        """Those there were at any moment from start to end."""
        first, last = bisect_left(self.times, start_s), bisect_right(self.times, end_s)
        return [self.at(start_s), *self.counts[first:last]]


@dataclass(slots=True)
class Watch:
    """The fleet as it was seen while a replay ran. loading, ready: when an instance was seen first so."""

    counts: Counts = field(default_factory=Counts)
    loading: dict[int, float] = field(default_factory=dict)
    ready: dict[int, float] = field(default_factory=dict)

    def look(self, fleet: coordinator_pb2.Fleet, now: float) -> None:
        self.counts.add(now, len(fleet.instances))
        for instance in fleet.instances:
            first = self.loading if instance.state == "loading" else self.ready
            first.setdefault(instance.instance_id, now)

    @property
    def load_s(self) -> float | None:
        """From launch to ready, in the median; None where nothing was launched."""
        seconds = [self.ready[i] - at for i, at in self.loading.items() if i in self.ready]
        return statistics.median(seconds) if seconds else None


def small_profile() -> Profile:
    """Of an instance so small that two cores can drive several: eight requests at once, 200 tokens a
    second."""
    return Profile(
        name="none/small/tp1/none",
        gpus=1,
        kv_capacity_tokens=8 * 2048,
        kv_bytes_per_token=1024,
        max_slots=8,
        max_step_tokens=512,
        max_model_len=2048,
        step_times=LinearStepTimes(COSTS),
        fit=COSTS,
        envelope=COSTS,
        copy_s_per_kv_token=1e-7,
        source="made up for a measure",
    )


def make_workload(options: Options) -> Workload:
    """A burst of interactive requests, and batch work from the start that is due."""
    scale = options.seconds
    spike = (
        f"spike:rate={RATE:g},factor={FACTOR:g},start={scale(BURST_AT_S):g},width={scale(BURST_S):g},"
        f"every={scale(10 * SECONDS):g},duration={scale(SECONDS):g},lengths={LENGTHS}"
    )
    batch = f"burst:count={options.count(BATCH_REQUESTS)},lengths={LENGTHS}"
    slos = SLOS[0], replace(SLOS[1], completion_s=scale(BATCH_DUE_S))
    return load_workload(spike, batch, slos, options.seed)


def measure(options: Options) -> Measured:
    measured = Measured()
    with tempfile.TemporaryDirectory(prefix="chiron-profile-") as folder:
        path = Path(folder) / "small.json"
        write_linear_profile(path, small_profile(), StepRegion(8, 8 * 2048, 512, 512 * 2048))
        workload = make_workload(options)
        with serving(
            *("--engines", "1", "--max-engines", str(MOST_ENGINES), "--block-size", str(BLOCK_SIZE)),
            profile=str(path),
        ) as server:
            seen, watch = asyncio.run(_replay(server, workload, options.seed))
        load_s = watch.load_s
        settings = WorldSettings(
            max_gpus=MOST_ENGINES,
            load_time_s=load_s if load_s is not None else 1.0,
            initial_instances=1,
            block_size=BLOCK_SIZE,
            max_output_tokens=OUTPUT_TOKENS,
        )
        (run,) = run_policies(workload, str(path), ["chiron"], settings, options.seed, bound=False)
    _report(measured, workload, seen, watch, run.result, load_s)
    return measured


async def _replay(server: Server, workload: Workload, seed: int) -> tuple[RunResult, Watch]:
    """What a client saw, and what the coordinator said of the fleet meanwhile."""
    await wait_fleet(server.address, 1)
    watch = Watch()
    async with InferenceClient(server.address) as client:
        info = await client.model_info(10.0)
        replay = Replay(client, workload, PromptSource(info.vocab_size, info.eos_token_ids, seed))
        watching = asyncio.create_task(_watch(server, watch))
        await replay.run(asyncio.Event())
        watching.cancel()
    measured = measure_replay(workload, replay.log, replay.wall_s)
    assert measured is not None  # all was sent
    return measured.result, watch


async def _watch(server: Server, watch: Watch) -> None:
    began = time.monotonic()
    async with CoordinatorClient(server.address) as client:
        while True:
            watch.look(await client.fleet(), time.monotonic() - began)
            await asyncio.sleep(LOOK_S)


def simulated_counts(result: RunResult) -> Counts:
    counts = Counts()
    for sample in result.samples:
        gauges = sample.gauges
        roles = gauges.interactive + gauges.mixed + gauges.batch
        counts.add(sample.time_s, roles + gauges.loading + gauges.draining)
    return counts


def distance(real: Counts, simulated: Counts, at_s: float, skew_s: float) -> int:
    """How far the real count at a moment is from the nearest that the simulator had within the skew."""
    count = real.at(at_s)
    return min(abs(count - other) for other in simulated.within(at_s - skew_s, at_s + skew_s))


def _report(
    measured: Measured,
    workload: Workload,
    seen: RunResult,
    watch: Watch,
    simulated: RunResult,
    load_s: float | None,
) -> None:
    real, modelled = watch.counts, simulated_counts(simulated)
    end_s = min(real.times[-1], modelled.times[-1])
    moments = [0.5 * i for i in range(int(2 * end_s))]
    apart = [distance(real, modelled, at, SKEW_S) for at in moments]
    strictly = [distance(real, modelled, at, 0.0) for at in moments]
    loading = "none was launched" if load_s is None else f"ready {load_s:.2f} s after launch, as simulated"
    measured.notes.append(
        f"{workload.num_requests} requests, the interactive ones {FACTOR:g} times as many in a burst, batch "
        f"due; up to {MOST_ENGINES} engines, {loading}"
    )
    for name, result, counts in (("processes", seen, real), ("simulator", simulated, modelled)):
        measured.rows.append(_row(name, result, counts, end_s))
    share = sum(gap <= 1 for gap in strictly) / len(strictly)
    measured.judge(
        f"instance counts within one of each other, changes {SKEW_S:g} s apart at most",
        f"at most {max(apart)} apart; at the very same moment within one {share:.1%} of the time",
        max(apart) <= 1,
    )
    measured.figures = {
        "load_s": load_s,
        "processes": _figures(seen, real),
        "simulator": _figures(simulated, modelled),
        "within_one_at_once": share,
        "most_apart": max(apart),
    }


def _row(name: str, result: RunResult, counts: Counts, end_s: float) -> dict[str, str]:
    figures = slo_figures(result)
    return {
        "through": name,
        **{
            f"{slo_class}\nin SLO %": f"{int(value * 10_000) / 100:.2f}"
            for slo_class, value in figures["slo_attainment"].items()
        },
        "TTFT s\np50 / p99": f"{figures['ttft_s']['p50']:.3f} / {figures['ttft_s']['p99']:.3f}",
        "instances\nmost": str(max(counts.counts)),
        "instances every tenth of the run": _course(counts, end_s),
    }


def _course(counts: Counts, end_s: float) -> str:
    return " ".join(str(counts.at(end_s * tenth / 10)) for tenth in range(11))


def _figures(result: RunResult, counts: Counts) -> dict[str, Any]:
    return {**slo_figures(result), "times_s": counts.times, "instances": counts.counts}
