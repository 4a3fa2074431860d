"""Batch work of ten instance-hours due in an hour: done, with few instances, gone soon after."""

from __future__ import annotations

import math

from chiron_engine.sim.work import least_work
from chiron_engine.sim.workload import BATCH_SLO, INTERACTIVE_SLO, ClassSlo

from .measure import TICK_S, Measured, Options, batch_ends, rate_for, run, workload_of

INSTANCE_HOURS = 10.0
DUE_S = 3600.0
BACKGROUND_LOAD = 0.2
LENGTHS = "arxiv-summarization"
SAMPLE = 20_000


def measure(options: Options) -> Measured:
    """All of it arrives at the start, beside a little interactive load that keeps the run going after
    the job, so that the retirement of batch instances is seen."""
    hours = INSTANCE_HOURS * options.scale
    slos = (INTERACTIVE_SLO, ClassSlo(BATCH_SLO.ttft_s, BATCH_SLO.itl_s, DUE_S))
    sample = workload_of(options, None, f"burst:count={SAMPLE},lengths={LENGTHS}", slos=slos)
    work_s = least_work(sample, options.load_profile()).total_s / SAMPLE
    count = max(1, round(3600.0 * hours / work_s))
    rate = rate_for(options, "azure-conv", BACKGROUND_LOAD)
    background = f"poisson:rate={rate:g},duration={1.5 * DUE_S:g},lengths=azure-conv"
    workload = workload_of(options, background, f"burst:count={count},lengths={LENGTHS}", slos=slos)
    least = math.ceil(count * work_s / (DUE_S - options.load_time_s))
    measured = Measured()
    measured.notes.append(
        f"{count:,} requests of {work_s:.3f} instance-seconds each = {hours:g} instance-hours, due "
        f"{DUE_S:g} s after arrival; at least {least} instances, each ready after {options.load_time_s:g} s"
    )
    for done in run(options, workload, ("chiron",), options.settings(2 * least)):
        finished_s, present_s = batch_ends(done.result)
        most = max((sample.gauges.batch for sample in done.result.samples), default=0)
        name = measured.add(done, **{"batch\ninstances": str(most)})
        unfinished = done.summary["slo_misses"]["batch"]["unfinished"]
        on_time = finished_s <= DUE_S and not unfinished
        measured.judge(name, f"done within {DUE_S:g} s", f"{finished_s:,.0f} s", on_time)
        measured.judge(name, f"at most {least + 1} batch instances", str(most), most <= least + 1)
        hold_s = options.lead_s + 2 * TICK_S
        gone_s = max(0.0, present_s + TICK_S - finished_s)
        target = f"batch instances gone {hold_s:g} s after the last of it (hold of one load lead, two ticks)"
        measured.judge(name, target, f"{gone_s:.0f} s", gone_s <= hold_s)
    return measured
