"""What an engine reports of itself."""

from __future__ import annotations

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.null_executor import NullExecutor
from chiron_engine.policy.iteration.request import Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import GREEDY
from chiron_engine.serving.engine_loop import EngineLoop
from chiron_engine.serving.telemetry import Telemetry
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
