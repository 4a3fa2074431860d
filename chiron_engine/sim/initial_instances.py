"""How many instances a simulated fleet begins with."""

from __future__ import annotations

import math
from bisect import bisect_right

from .profile import Profile
from .sim_policy import SimPolicy
from .workload import Workload
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
    needed = math.ceil(_demand(workload, profile, window_s)) + 1
    return min(needed, settings.max_gpus // profile.gpus)


def _demand(workload: Workload, profile: Profile, window_s: float) -> float:
    """Instances that the interactive requests arriving within the window keep busy through it."""
    assert workload.interactive is not None
    trace = workload.interactive.trace
    arrived = bisect_right(trace.arrival_s, window_s)
    work = sum(_work_s(profile, trace.prompt_tokens[r], trace.output_tokens[r]) for r in range(arrived))
    return work / window_s


def _work_s(profile: Profile, prompt: int, output: int) -> float:
    """Seconds of one instance for one request, in steps whose KV fills the device."""
    fit = profile.fit
    per_context_s = fit.per_kv_token_s + fit.base_s / profile.kv_capacity_tokens
    return (
        fit.prefill_s(prompt)
        + fit.per_request_s * output
        + per_context_s * (prompt * output + output * (output + 1) / 2)
    )
