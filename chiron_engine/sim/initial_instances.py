"""How many instances a simulated fleet begins with."""

from __future__ import annotations

import math
from bisect import bisect_right

from chiron_engine.policy.fleet.capacity import CapacityModel
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import InstanceSpec

from .sim_policy import SimPolicy
from .workload import Stream, Workload
from .world_settings import WorldSettings

LEAST_WINDOW_S = 10.0


def initial_instances(
    workload: Workload, spec: InstanceSpec, config: FleetConfig, policy: SimPolicy, settings: WorldSettings
) -> int:
    """The same rule for every policy but a static one: what the settings say, or else what the
    interactive demand of the first load time needs plus one, at most what the devices hold; none
    without interactive requests."""
    if policy.static_instances is not None:
        return policy.static_instances
    if settings.initial_instances is not None:
        return settings.initial_instances
    if workload.interactive is None:
        return 0
    demand = _demand(workload.interactive, CapacityModel(spec, config), max(spec.load_s, LEAST_WINDOW_S))
    return min(math.ceil(demand) + 1, settings.max_gpus // spec.gpus)


def _demand(stream: Stream, model: CapacityModel, window_s: float) -> float:
    """Instances that the requests arriving within the window keep busy through it."""
    trace = stream.trace
    arrived = bisect_right(trace.arrival_s, window_s)
    work = (
        model.work_s(trace.prompt_tokens[row], trace.output_tokens[row], stream.slo.itl_s)
        for row in range(arrived)
    )
    return sum(work) / window_s
