"""Traces scaled to the demand of a number of instances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from chiron_engine.policy.iteration.request import SloClass

from .profile import Profile
from .traces.columns import Floats, Ints, arrivals_of, make_trace, outputs_of, prompts_of, take_rows
from .traces.prefix_blocks import PrefixBlocks
from .traces.trace import Trace
from .work import least_work
from .workload import ClassSlo, Stream, Workload

JITTER_S = 60.0
MAX_REQUESTS = 20_000_000
_CLOSE = 0.02
_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class ScaledTrace:
    """copies: how often each request of the source is in it, in the mean. demand: instances busy in
    the mean over the span, as measured on the scaled trace; next to the load asked for."""

    trace: Trace
    copies: float
    demand: float


def mean_demand(
    trace: Trace, slo_class: SloClass, slo: ClassSlo, profile: Profile, span_s: float | None = None
) -> float:
    """Instances kept busy in the mean: work of all requests over `span_s`, by default the trace's own.
    Raises ValueError if that is 0."""
    span_s = trace.span_s if span_s is None else span_s
    _check_span(trace, span_s)
    return least_work(_alone(trace, slo_class, slo), profile).total_s / span_s


def _check_span(trace: Trace, span_s: float) -> None:
    if span_s <= 0:
        raise ValueError(
            f"{trace.name}: all requests arrive at once, so there is no mean demand to scale;"
            " leave the load out, or lay the arrivals out over time"
        )


def _alone(trace: Trace, slo_class: SloClass, slo: ClassSlo) -> Workload:
    stream = Stream(slo_class, trace, slo, 0)
    return Workload(stream, None) if slo_class is SloClass.INTERACTIVE else Workload(None, stream)


def scale_to_load(
    trace: Trace,
    load: float,
    slo_class: SloClass,
    slo: ClassSlo,
    profile: Profile,
    seed: int,
    span_s: float | None = None,
) -> ScaledTrace:
    """The trace as often as keeps `load` instances busy in the mean, at the least work of its requests.

    Whole copies are laid over each other, each but the first shifted by a random time of up to 60 s;
    what is shifted beyond the end comes round at the start. Of one more copy a random part of the rows
    is taken; more rounds are made where that part finds fewer prefixes than the whole did. So the
    course of the rate over minutes stays, scaled, while bursts of seconds are thinned out: state the
    index of dispersion of the result. Copies share no prefixes.

    Raises ValueError for a load that is not above 0 or would take too many requests.
    """
    if not (math.isfinite(load) and load > 0):
        raise ValueError(f"the load is {load}; give the instances to keep busy, over 0")
    span_s = trace.span_s if span_s is None else span_s
    _check_span(trace, span_s)
    work = least_work(_alone(trace, slo_class, slo), profile)
    copies = load * span_s / work.total_s
    for _ in range(_ROUNDS):
        _check_size(trace, load, copies)
        scaled = superpose(trace, copies, seed)
        demand = least_work(_alone(scaled, slo_class, slo), profile, work.prices).total_s / span_s
        if abs(demand / load - 1) <= _CLOSE:
            break
        copies *= load / demand
    return ScaledTrace(scaled, len(scaled) / len(trace), demand)


def _check_size(trace: Trace, load: float, copies: float) -> None:
    if copies * len(trace) > MAX_REQUESTS:
        raise ValueError(
            f"{trace.name}: a load of {load:g} takes about {copies * len(trace):,.9g} requests;"
            f" at most {MAX_REQUESTS:,} are possible"
        )


def superpose(trace: Trace, copies: float, seed: int) -> Trace:
    """`copies` copies, the last one in part; see `scale_to_load`. At least one request is left."""
    rng = np.random.default_rng(seed)
    total = max(1, round(copies * len(trace)))
    whole, part = divmod(total, len(trace))
    count = whole + bool(part)
    last_rows = np.sort(rng.choice(len(trace), part, replace=False)) if part else np.arange(len(trace))
    rows = np.concatenate([np.arange((count - 1) * len(trace)), (count - 1) * len(trace) + last_rows])
    arrivals = _shifted(trace, count, rng)[rows]
    order = np.argsort(arrivals, kind="stable")
    return take_rows(_repeated(trace, count), rows[order], arrivals[order], f"{trace.name} x {copies:.4g}")


def _shifted(trace: Trace, count: int, rng: np.random.Generator) -> Floats:
    """Arrivals of all copies one after the other."""
    arrivals, span = arrivals_of(trace), trace.span_s
    period = span + span / max(1, len(trace) - 1)
    shifts = np.concatenate(([0.0], rng.uniform(0.0, JITTER_S, count - 1)))
    shifted = arrivals[None, :] + shifts[:, None]
    return (np.mod(shifted, period) if period else shifted).ravel()


def _repeated(trace: Trace, count: int) -> Trace:
    blocks = trace.prefix_blocks
    repeat: Ints = np.tile(np.arange(len(trace)), count)
    return make_trace(
        trace.name,
        arrivals_of(trace)[repeat],
        prompts_of(trace)[repeat],
        outputs_of(trace)[repeat],
        None if blocks is None else PrefixBlocks.of(blocks).copies(count),
        trace.prefix_block_tokens,
    )
