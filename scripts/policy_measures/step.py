"""A step of half the load more: met within the load time and two ticks."""

from __future__ import annotations

from .measure import TICK_S, Measured, Options, misses_between, rate_for, run, samples_between, workload_of

LOAD = 10.0
FACTOR = 1.5
AFTER_S = 1200.0


def measure(options: Options) -> Measured:
    """Met means that from then on demand stays within the ready interactive and mixed instances and
    no interactive request is held back for want of one."""
    load = LOAD * options.scale
    at_s = options.warm_up_s
    end_s = at_s + AFTER_S
    allowed_s = options.load_time_s + 2 * TICK_S
    measured = Measured()
    measured.notes.append(
        f"Poisson arrivals at a mean demand of {load:g} instances, {FACTOR:g} times as much from "
        f"{at_s:,.0f} s on"
    )
    rate = rate_for(options, "azure-conv", load)
    spec = f"step:rate={rate:g},factor={FACTOR:g},at={at_s:g},duration={end_s:g},lengths=azure-conv"
    workload = workload_of(options, spec)
    for done in run(options, workload, ("chiron",), options.settings(load * FACTOR)):
        short = [
            sample.time_s - at_s
            for sample in samples_between(done.result, at_s, end_s)
            if sample.gauges.busy > sample.gauges.interactive + sample.gauges.mixed
            or sample.gauges.held_interactive
        ]
        met_after_s = max(short, default=0.0)
        missed, arrived = misses_between(done.result, [(at_s, end_s)])
        name = measured.add(done, **{"met\nafter s": f"{met_after_s:.0f}"})
        seen = f"{met_after_s:.0f} s; {missed} of {arrived:,} requests after the step missed their SLO"
        measured.judge(name, f"met within {allowed_s:g} s", seen, met_after_s <= allowed_s)
    return measured
