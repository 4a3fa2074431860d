"""Steady load: no scaling action in an hour."""

from __future__ import annotations

from .measure import (
    SETTLE_S,
    Measured,
    Options,
    rate_for,
    run,
    samples_between,
    scaling_actions_between,
    workload_of,
)

LOAD = 10.0
HOUR_S = 3600.0


def measure(options: Options) -> Measured:
    """Poisson arrivals of Azure's conversation lengths at one rate; the hour begins when Theta rests
    on history and what that changed is done."""
    load = LOAD * options.scale
    start_s, end_s = options.warm_up_s, options.warm_up_s + HOUR_S
    measured = Measured()
    measured.notes.append(
        f"Poisson arrivals at a mean demand of {load:g} instances; counted from {start_s:,.0f} s (20 load "
        f"leads of history for Theta and {SETTLE_S:g} s to act on it) to {end_s:,.0f} s"
    )
    rate = rate_for(options, "azure-conv", load)
    spec = f"poisson:rate={rate:g},duration={end_s:g},lengths=azure-conv"
    workload = workload_of(options, spec)
    for done in run(options, workload, ("chiron",), options.settings(load)):
        actions = scaling_actions_between(done.result, start_s, end_s)
        thetas = [sample.gauges.theta for sample in samples_between(done.result, start_s, end_s)]
        name = measured.add(done, **{"actions in\nthe hour": str(actions)})
        seen = f"{actions}, with Theta from {min(thetas):.2f} to {max(thetas):.2f}"
        measured.judge(name, "no scaling action in the hour", seen, actions == 0)
    return measured
