"""What `chiron simulate` does: build the workload, check it, run it under each policy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from chiron_engine.policy.iteration.request import SloClass
from chiron_engine.sim.load_scaling import mean_demand, scale_to_load
from chiron_engine.sim.policies import SimPolicy
from chiron_engine.sim.profile import Profile
from chiron_engine.sim.profiles import load_profile
from chiron_engine.sim.run_result import RunResult
from chiron_engine.sim.summary import summary
from chiron_engine.sim.traces.columns import take_rows
from chiron_engine.sim.traces.load import DEFAULT_SPAN_S, load_trace
from chiron_engine.sim.traces.trace import Trace
from chiron_engine.sim.workload import BATCH_SLO, INTERACTIVE_SLO, ClassSlo, Stream, Workload, make_workload
from chiron_engine.sim.world import World
from chiron_engine.sim.world_settings import WorldSettings

from .console import SimulationProgress


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """summary: the JSON of one run."""

    summary: dict[str, Any]
    result: RunResult


def load_workload(
    interactive: str | None,
    batch: str | None,
    slos: tuple[ClassSlo, ClassSlo],
    seed: int,
    duration_s: float | None = None,
) -> Workload:
    """The traces of both classes as they are, or what arrives in their first `duration_s`. Lengths
    without arrivals arrive over the span of the interactive trace. slos: interactive, batch.

    Raises ValueError that says what is wrong with a trace.
    """
    first = _load(interactive, seed, duration_s or DEFAULT_SPAN_S, duration_s) if interactive else None
    span_s = (first.span_s if first else 0.0) or duration_s or DEFAULT_SPAN_S
    second = _load(batch, _seed_of("batch", seed), span_s, duration_s) if batch else None
    return make_workload(first, second, *slos)


def _seed_of(part: str, seed: int) -> int:
    """Of one part of a run, so that no two draw the same."""
    return Random(f"{part} {seed}").getrandbits(32)


def _load(spec: str, seed: int, span_s: float, duration_s: float | None) -> Trace:
    trace = load_trace(spec, seed, span_s)
    return trace if duration_s is None else cut(trace, duration_s)


def cut(trace: Trace, duration_s: float) -> Trace:
    """What arrives before `duration_s`. Raises ValueError if nothing does."""
    arrivals = np.asarray(trace.arrival_s)
    rows = int(np.searchsorted(arrivals, duration_s))
    if not rows:
        raise ValueError(
            f"nothing of {trace.name} arrives in the first {duration_s:g} s; the first request comes at "
            f"{arrivals[0]:g} s"
        )
    return take_rows(trace, np.arange(rows), arrivals[:rows])


def scale_workload(
    workload: Workload, profile: Profile, load: float | None, batch_load: float | None, seed: int
) -> Workload:
    """Each class scaled to a mean demand in instances, None for the arrivals as they are; batch_load
    None means as `load`. Raises ValueError for what cannot be scaled."""
    loads = {SloClass.INTERACTIVE: load, SloClass.BATCH: batch_load if batch_load is not None else load}
    traces: dict[SloClass, Trace] = {}
    for stream in workload.streams:
        traces[stream.slo_class] = stream.trace
        wanted = loads[stream.slo_class]
        if wanted is not None:
            drawn = _seed_of(f"scale {stream.slo_class.name}", seed)
            scaled = scale_to_load(stream.trace, wanted, stream.slo_class, stream.slo, profile, drawn)
            traces[stream.slo_class] = scaled.trace
    slos = {stream.slo_class: stream.slo for stream in workload.streams}
    return make_workload(
        traces.get(SloClass.INTERACTIVE),
        traces.get(SloClass.BATCH),
        slos.get(SloClass.INTERACTIVE, INTERACTIVE_SLO),
        slos.get(SloClass.BATCH, BATCH_SLO),
    )


def demands(workload: Workload, profile: Profile) -> dict[str, float | None]:
    """Instances that each class keeps busy in the mean, by the least work of its requests; None where
    all arrive at once."""
    return {
        stream.slo_class.name.lower(): mean_demand(stream.trace, stream.slo_class, stream.slo, profile)
        if stream.trace.span_s
        else None
        for stream in workload.streams
    }


def check_policies(policies: Sequence[SimPolicy], profile: Profile, settings: WorldSettings) -> None:
    """Raises ValueError for a fixed fleet that is empty or that the GPUs do not hold."""
    most = settings.max_gpus // profile.gpus
    for name, count in (
        *((policy.name, policy.static_instances) for policy in policies),
        ("initial_instances", settings.initial_instances),
    ):
        if count is not None and count > most:
            raise ValueError(
                f"{name}: {count} instances are more than {settings.max_gpus} GPUs hold; at most {most} fit"
            )
    for policy in policies:
        if policy.static_instances == 0:
            raise ValueError(f"{policy.name}: a fleet of no instance serves nothing; give at least 1")


def run_policies(
    workload: Workload,
    profile_name: str,
    policies: Sequence[SimPolicy],
    settings: WorldSettings,
    seed: int,
    *,
    bound: bool = True,
    **more: Any,
) -> list[PolicyRun]:
    """One run after another on the same workload. `more` goes into each summary."""
    bound_gpu_hours = _bound(workload, profile_name, settings) if bound else None
    demand = demands(workload, load_profile(profile_name))
    runs = []
    for policy in policies:
        # Each run counts the steps beyond its profile's tables by itself.
        world = World(workload, load_profile(profile_name), policy, settings, seed)
        until_s = max(stream.trace.span_s for stream in workload.streams)
        progress = SimulationProgress(policy.name, until_s)
        start = time.perf_counter()
        try:
            result = world.run(progress)
        finally:
            progress.done()
        figures = summary(
            result,
            bound_gpu_hours,
            policy=policy.name,
            profile=profile_name,
            wall_s=time.perf_counter() - start,
            local_autoscaler=policy.local_autoscaler,
            seed=seed,
            slo=slo_record(workload),
            mean_demand=demand,
            max_gpus=settings.max_gpus,
            load_time_s=settings.load_time_s,
            **more,
        )
        runs.append(PolicyRun(figures, result))
    return runs


def _bound(workload: Workload, profile_name: str, settings: WorldSettings) -> float:
    from chiron_engine.sim.bound import lower_bound

    return lower_bound(workload, load_profile(profile_name), settings.load_time_s).gpu_hours


def slo_record(workload: Workload) -> dict[str, dict[str, float]]:
    """The objectives of each class, resolved to seconds."""
    record = {}
    for stream in workload.streams:
        slo = {"ttft_s": stream.slo.ttft_s, "itl_s": stream.slo.itl_s}
        if stream.slo_class is SloClass.BATCH:
            slo["completion_s"] = stream.completion_s
        record[stream.slo_class.name.lower()] = slo
    return record


def describe(workload: Workload, profile_name: str, summary: Mapping[str, Any]) -> list[str]:
    """One line on the instances, then one a class: what arrives and what it is promised."""
    lines = [f"instances: {profile_name}"]
    bound = summary["lower_bound_gpu_hours"]
    if bound is not None:
        lines[0] += f"; no policy that attains 99 % takes fewer than {bound:.2f} GPU-hours"
    for stream in workload.streams:
        name = stream.slo_class.name.lower()
        spread, demand = summary["index_of_dispersion"][name]["10s"], summary["mean_demand"][name]
        lines.append(f"{name}: {_arrivals(stream, demand, spread)}; {_promise(stream)}")
    return lines


def _arrivals(stream: Stream, demand: float | None, dispersion_10s: float | None) -> str:
    trace = stream.trace
    text = f"{len(trace):,} requests of {trace.name} in {trace.span_s:,.0f} s"
    if demand is not None:
        text += f", mean demand {demand:.3g} instances"
    if dispersion_10s is not None:
        text += f", index of dispersion {dispersion_10s:.2f} (10 s)"
    return text


def _promise(stream: Stream) -> str:
    slo = stream.slo
    if stream.slo_class is SloClass.BATCH:
        return f"complete {stream.completion_s:,.0f} s after arrival"
    return f"TTFT SLO {slo.ttft_s:g} s, ITL SLO {slo.itl_s * 1e3:.4g} ms"
