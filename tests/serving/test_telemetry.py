"""What an engine reports of itself."""

from __future__ import annotations

from chiron_engine.cluster.fleet_counters import EngineTotals
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.null_executor import NullExecutor
from chiron_engine.policy.iteration.request import Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import GREEDY
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.serving.engine_loop import EngineLoop
from chiron_engine.serving.telemetry import Telemetry
from tests.core.speculating import asked, repeating, speculating_core
from tests.gateway.serving_stack import SHAPE


def test_classes_are_told_apart_among_those_that_run() -> None:
    core = EngineCore(NullExecutor(SHAPE))
    core.set_limits(3, 512)
    loop = EngineLoop(core)
    telemetry = Telemetry(core, loop, "boot")
    classes = [SloClass.INTERACTIVE, SloClass.INTERACTIVE, *[SloClass.BATCH] * 4]
    for number, slo_class in enumerate(classes):
        core.add(Request(number, [1, 2], GREEDY, 50, slo=Slo(slo_class)))
    for _ in range(3):
        loop._turn()
    report = telemetry.snapshot()
    assert (report.running_interactive, report.running_batch, report.waiting) == (2, 1, 3)
    assert report.last_step.requests == 3
    assert report.boot_id == "boot"


def test_tokens_that_were_guessed_are_reported_and_summed() -> None:
    core, _ = speculating_core(StepCosts(20e-3, 0.5e-3, 1e-7, 0.4e-3), repeating)
    telemetry = Telemetry(core, EngineLoop(core), "boot")
    told = 0
    requests = [asked(0, 120), asked(1, 120)]
    requests[1].slo = Slo(SloClass.BATCH)
    for request in requests:
        core.add(request)
    while core.has_work:
        told += len(core.step().requests)
    telemetry._loop._load = core.load()
    report = telemetry.snapshot()
    assert report.drafted_tokens >= report.accepted_tokens > 100
    # The first token of each comes with its prompt, and is not counted as one of a decoding request.
    assert (told, report.output_tokens_total, report.batch_tokens_total) == (240, 238, 119)
    totals = EngineTotals()
    for _ in range(2):
        totals.add(report)
    assert (totals.drafted_tokens, totals.accepted_tokens) == (
        2 * report.drafted_tokens,
        2 * report.accepted_tokens,
    )
