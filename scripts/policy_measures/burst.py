"""A burst within the ratio seen before costs no interactive SLO."""

from __future__ import annotations

import math

from .measure import Measured, Options, misses_between, rate_for, run, workload_of

LOAD = 5.0
FACTOR = 3.0
WIDTH_S = 60.0
EVERY_S = 600.0
BURSTS_AFTER = 4


def measure(options: Options) -> Measured:
    """Equal bursts at equal distance. Those before Theta rests on history teach it; the later ones
    are counted, with what arrives until a minute after each."""
    load = LOAD * options.scale
    first = math.ceil(options.warm_up_s / EVERY_S)
    starts = [EVERY_S * (number + 1) for number in range(first, first + BURSTS_AFTER)]
    end_s = starts[-1] + EVERY_S
    measured = Measured()
    measured.notes.append(
        f"a mean demand of {load:g} instances between bursts of {FACTOR:g} times that, {WIDTH_S:g} s every "
        f"{EVERY_S:g} s, evenly spaced arrivals; the {BURSTS_AFTER} bursts from {starts[0]:,.0f} s on count, "
        f"the {first} before teach"
    )
    rate = rate_for(options, "azure-conv", load)
    spec = (
        f"spike:rate={rate:g},factor={FACTOR:g},start={EVERY_S:g},width={WIDTH_S:g},every={EVERY_S:g},cv=0,"
        f"duration={end_s:g},lengths=azure-conv"
    )
    workload = workload_of(options, spec)
    for done in run(options, workload, ("chiron",), options.settings(load * FACTOR)):
        counted = [(start_s, start_s + 2 * WIDTH_S) for start_s in starts]
        missed, arrived = misses_between(done.result, counted)
        name = measured.add(done, **{"missed in\nbursts": str(missed)})
        seen = f"{missed} of {arrived:,} requests"
        measured.judge(name, "no request of a burst misses its SLO", seen, missed == 0)
    return measured
