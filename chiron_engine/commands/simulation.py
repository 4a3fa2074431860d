"""What `chiron simulate` does: build the workload, check it, run it under each policy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np

from chiron_engine.policy.iteration.request import SloClass
from chiron_engine.sim.bound import Bound, lower_bound
from chiron_engine.sim.clairvoyant import clairvoyant_policy, clairvoyant_schedule
from chiron_engine.sim.load_scaling import mean_demand, scale_to_load
from chiron_engine.sim.policies import POLICIES, make_policy
from chiron_engine.sim.profile import Profile
from chiron_engine.sim.profiles import load_profile
from chiron_engine.sim.run_result import RunResult
from chiron_engine.sim.sim_policy import SimPolicy
from chiron_engine.sim.summary import summary
from chiron_engine.sim.traces.columns import take_rows
from chiron_engine.sim.traces.load import DEFAULT_SPAN_S, load_trace
from chiron_engine.sim.traces.trace import Trace
from chiron_engine.sim.workload import BATCH_SLO, INTERACTIVE_SLO, ClassSlo, Stream, Workload, make_workload
from chiron_engine.sim.world import World
from chiron_engine.sim.world_settings import WorldSettings

from .console import RunProgress
from .durations import parse_positive

CLAIRVOYANT = "clairvoyant"
POLICY_NAMES = (*POLICIES, f"{CLAIRVOYANT}[:HEADROOM]")


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
    first = second = None
    span_s = duration_s or DEFAULT_SPAN_S
    if interactive:
        first = cut(load_trace(interactive, seed, span_s, SloClass.INTERACTIVE), duration_s)
        span_s = first.span_s or span_s
    if batch:
        second = cut(load_trace(batch, seed_of("batch", seed), span_s, SloClass.BATCH), duration_s)
    return make_workload(first, second, *slos)


def seed_of(part: str, seed: int) -> int:
    """Of one part of a run, so that no two draw the same."""
    return Random(f"{part} {seed}").getrandbits(32)


def cut(trace: Trace, duration_s: float | None) -> Trace:
    """What arrives before `duration_s`; all of it for None. Raises ValueError if nothing does."""
    if duration_s is None:
        return trace
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
            drawn = seed_of(f"scale {stream.slo_class.name}", seed)
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


def check_policies(
    names: Sequence[str], local_autoscaler: str | None, profile: Profile, settings: WorldSettings
) -> None:
    """Raises ValueError for a name that does not exist, and says which do; also for a fixed fleet
    that is empty or that the GPUs do not hold."""
    if local_autoscaler is not None:
        make_policy("chiron", local_autoscaler)
    fixed = {name: _fixed_instances(name) for name in names}
    fixed["initial_instances"] = settings.initial_instances
    most = settings.max_gpus // profile.gpus
    for name, count in fixed.items():
        if count is not None and count > most:
            raise ValueError(
                f"{name}: {count} instances are more than {settings.max_gpus} GPUs hold; at most {most} fit"
            )
        if count == 0 and name != "initial_instances":
            raise ValueError(f"{name}: a fleet of no instance serves nothing; give at least 1")


def _fixed_instances(name: str) -> int | None:
    """N of a fleet that never changes. Raises ValueError for a name that does not exist."""
    if _headroom(name) is not None:
        return None
    try:
        return make_policy(name).static_instances
    except ValueError as error:
        raise ValueError(f"there is no policy {name!r}; there are {', '.join(POLICY_NAMES)}") from error


def _headroom(name: str) -> float | None:
    """Of a clairvoyant schedule, over the counts it is rounded from; None for other policies."""
    kind, colon, number = name.partition(":")
    if kind != CLAIRVOYANT:
        return None
    headroom = parse_positive(number) if colon else 1.0
    if headroom < 1:
        raise ValueError(f"{name}: the headroom is {headroom:g}; it must be at least 1")
    return headroom


def run_policies(
    workload: Workload,
    profile_name: str,
    names: Sequence[str],
    settings: WorldSettings,
    seed: int,
    *,
    local_autoscaler: str | None = None,
    bound: bool = True,
    **more: Any,
) -> list[PolicyRun]:
    """One run after another on the same workload, by names that `check_policies` lets pass. `more`
    goes into each summary."""
    profile = load_profile(profile_name)
    schedules = any(_headroom(name) is not None for name in names)
    least = lower_bound(workload, profile, settings.load_time_s) if bound or schedules else None
    record = {
        "seed": seed,
        "slo": slo_record(workload),
        "mean_demand": demands(workload, profile),
        "max_gpus": settings.max_gpus,
        "load_time_s": settings.load_time_s,
        **more,
    }
    runs = []
    for name in names:
        policy, own_settings = _policy(name, local_autoscaler, least, profile, settings)
        result, wall_s = _run(workload, profile_name, policy, own_settings, seed)
        figures = summary(
            result,
            least.gpu_hours if least else None,
            policy=name,
            profile=profile_name,
            wall_s=wall_s,
            local_autoscaler=policy.local_autoscaler,
            **record,
        )
        runs.append(PolicyRun(figures, result))
    return runs


def _policy(
    name: str, local_autoscaler: str | None, least: Bound | None, profile: Profile, settings: WorldSettings
) -> tuple[SimPolicy, WorldSettings]:
    """The policy, and the settings it starts with: a clairvoyant one knows how many it begins with."""
    headroom = _headroom(name)
    if headroom is None or least is None:
        return make_policy(name, local_autoscaler), settings
    schedule = clairvoyant_schedule(least, settings.load_time_s, headroom)
    initial = settings.initial_instances
    if initial is None:
        initial = min(schedule.initial, settings.max_gpus // profile.gpus)
    policy = clairvoyant_policy(schedule, local_autoscaler or "adaptive")
    return policy, replace(settings, initial_instances=initial)


def _run(
    workload: Workload, profile_name: str, policy: SimPolicy, settings: WorldSettings, seed: int
) -> tuple[RunResult, float]:
    """The result and the seconds it took. Each run has a profile of its own, which counts the steps
    beyond its tables."""
    world = World(workload, load_profile(profile_name), policy, settings, seed)
    progress = RunProgress(policy.name, max(stream.trace.span_s for stream in workload.streams))
    start = time.perf_counter()
    try:
        return world.run(progress), time.perf_counter() - start
    finally:
        progress.done()


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
        lines.append(describe_stream(stream, demand, spread))
    return lines


def describe_stream(stream: Stream, demand: float | None = None, dispersion_10s: float | None = None) -> str:
    """What arrives of a class and what it is promised; demand in instances."""
    name = stream.slo_class.name.lower()
    return f"{name}: {_arrivals(stream, demand, dispersion_10s)}; {_promise(stream)}"


def _arrivals(stream: Stream, demand: float | None, dispersion_10s: float | None) -> str:
    trace = stream.trace
    requests = "request" if len(trace) == 1 else "requests"
    text = f"{len(trace):,} {requests} of {trace.name} in {trace.span_s:,.6g} s"
    if demand is not None:
        text += f", mean demand {demand:.3g} instances"
    if dispersion_10s is not None:
        text += f", index of dispersion {dispersion_10s:.2f} (10 s)"
    return text


def _promise(stream: Stream) -> str:
    slo = stream.slo
    if stream.slo_class is SloClass.BATCH:
        return f"complete {stream.completion_s:,.6g} s after arrival"
    return f"TTFT SLO {slo.ttft_s:g} s, ITL SLO {slo.itl_s * 1e3:.4g} ms"
