#!/usr/bin/env python3
"""What recordings cost: CPU time and bytes of an event of the fleet, and of a step of an engine.

The step's cost is the difference between an engine that records and one that does not, over an
executor that computes nothing, with requests that come and go. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from chiron_engine.cluster.event_log import EventLog
from chiron_engine.core.core_settings import CoreSettings
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.null_executor import NullExecutor
from chiron_engine.core.step_record import RecordedCore, StepRecord
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import (
    FleetEffect,
    FleetEvent,
    FleetRequest,
    InstanceReported,
    InstanceSpec,
    MeasuredStep,
    RequestArrived,
    RequestFinished,
    Route,
)
from chiron_engine.policy.iteration.request import Request, Slo
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.policy.iteration.step_costs import StepCosts

PROMPT_TOKENS, OUTPUT_TOKENS = 100, 200
REQUESTS_PER_S, ENGINES, REPORTS_PER_S = 100, 50, 4
COSTS = StepCosts(5e-3, 1e-5, 1e-8, 2e-6)
STEP = MeasuredStep(0.0123456, 15, 12345, 512, 9876)
REPORTED = InstanceReported(3, 10, 5, 0, 12345, 64, 2048, 0.0123456, 123456, 234567, 3, STEP, 0.87, 0.1)


def events_of(count: int) -> dict[str, tuple[list[FleetEvent], list[FleetEffect]]]:
    """Events of a kind, and the effects of each."""
    requests = [FleetRequest(i, Slo(), 123456.789012, 345, 256, "0123456789abcdef") for i in range(count)]
    return {
        "arrived": ([RequestArrived(request) for request in requests], [Route(5, 3, 0)]),
        "finished": ([RequestFinished(i, 200) for i in range(count)], []),
        "reported": ([REPORTED] * count, []),
    }


def time_events(path: Path, events: Sequence[FleetEvent], effects: list[FleetEffect]) -> dict[str, float]:
    """The writer's thread included."""
    log = EventLog(path)
    log.begin("chiron", InstanceSpec(COSTS, 4096, 16, 2048), FleetConfig(), 1, 0.0)
    began = time.process_time()
    for event in events:
        log.event(event, 123456.789012345)
        log.effects(effects)
    log.close()
    seconds = time.process_time() - began
    return {"us": seconds / len(events) * 1e6, "bytes": path.stat().st_size / len(events)}


def time_steps(core: EngineCore, requests: int) -> float:
    """CPU microseconds a step."""
    began, steps = time.process_time(), 0
    for number in range(requests):
        prompt = [(number * 17 + i) % 1000 for i in range(PROMPT_TOKENS)]
        core.add(Request(number, prompt, SamplingParams(), OUTPUT_TOKENS))
    while core.has_work:
        core.step()
        steps += 1
    core.close()
    return (time.process_time() - began) / steps * 1e6


def measure_steps(folder: Path, running: int) -> dict[str, float]:
    blocks = running * (PROMPT_TOKENS + OUTPUT_TOKENS) // 16 * 2
    settings = CoreSettings(ExecutorShape(16, blocks, 0, running, 512, 4096, 32_000))
    plain = time_steps(settings.build(NullExecutor(settings.shape)), 5 * running)
    record = StepRecord(folder)
    core = RecordedCore(settings, NullExecutor(settings.shape), record)
    recorded = time_steps(core, 5 * running)
    steps = core.load().step
    return {"us": recorded - plain, "bytes": record.path.stat().st_size / steps, "without_us": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--events", type=int, default=50_000, help="of each kind (50000)")
    parser.add_argument("--running", type=int, default=64, help="requests that decode (64)")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        result: dict[str, Any] = {
            name: time_events(Path(folder) / name, *events)
            for name, events in events_of(options.events).items()
        }
        us = REQUESTS_PER_S * (result["arrived"]["us"] + result["finished"]["us"])
        us += ENGINES * REPORTS_PER_S * result["reported"]["us"]
        result["core_share_at_100_requests_per_s_and_50_engines"] = us * 1e-6
        result["step"] = measure_steps(Path(folder) / "steps", options.running)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
