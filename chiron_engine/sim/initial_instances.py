"""How many instances a simulated fleet begins with."""

from __future__ import annotations

import math
from bisect import bisect_right

import numpy as np

from .load_scaling import mean_demand
from .profile import Profile
from .sim_policy import SimPolicy
from .traces.columns import arrivals_of, take_rows
from .workload import Stream, Workload
from .world_settings import WorldSettings

LEAST_WINDOW_S = 10.0


def initial_instances(
    workload: Workload, profile: Profile, policy: SimPolicy, settings: WorldSettings
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
    window_s = max(settings.load_time_s, LEAST_WINDOW_S)
    needed = math.ceil(_demand(workload.interactive, profile, window_s)) + 1
    return min(needed, settings.max_gpus // profile.gpus)


def _demand(stream: Stream, profile: Profile, window_s: float) -> float:
    """Instances that the requests arriving within the window keep busy through it."""
    arrived = bisect_right(stream.trace.arrival_s, window_s)
    if not arrived:
        return 0.0
    rows = np.arange(arrived)
    first = take_rows(stream.trace, rows, arrivals_of(stream.trace)[rows])
    return mean_demand(first, stream.slo_class, stream.slo, profile, span_s=window_s)
