"""What a simulation is refused for before it runs: work that no instance can take, and objectives
that none can meet, each told with what is on offer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .profile import Profile
from .workload import Stream, Workload
from .world_settings import WorldSettings

BATCH_1_CONTEXT = 1024
"""Tokens of context at which the batch-1 step is taken, the unit of ITL SLOs such as 1.5x."""
MOST_PERIODS = 3_000_000
"""A month of seconds. Each takes some 0.1 ms and 1 kB."""


def batch_1_step_s(profile: Profile) -> float:
    """Seconds between the tokens of one request alone on an instance, as long a one as it holds."""
    return profile.step_times.seconds(1, min(BATCH_1_CONTEXT, largest_request(profile)), 0, 0)


def prefill_s(profile: Profile, tokens: int) -> float:
    """Seconds of a prompt alone on an instance, in chunks as large as a step may be."""
    chunk = min(profile.max_step_tokens, tokens)
    seconds = 0.0
    for start in range(0, tokens, chunk):
        end = min(start + chunk, tokens)
        seconds += profile.step_times.seconds(0, 0, end - start, (end - start) * end)
    return seconds


def check_feasible(workload: Workload, profile: Profile, max_gpus: int, block_size: int = 64) -> list[str]:
    """Remarks on requests that cannot attain their objectives whatever the policy does. block_size:
    of KV, in tokens.

    Raises ValueError for a fleet that holds no instance, for requests larger than any instance,
    and for an objective that no request of its class can meet.
    """
    if max_gpus < profile.gpus:
        raise ValueError(
            f"max_gpus is {max_gpus}, but one instance of {profile.name} takes {_count(profile.gpus, 'GPU')}"
        )
    for stream in workload.streams:
        _check_sizes(stream, profile, block_size)
    remarks: list[str] = []
    if workload.interactive is not None:
        remarks += _check_interactive(workload.interactive, profile)
    if workload.batch is not None:
        remarks += _check_batch(workload.batch, profile)
    return remarks


def check_length(workload: Workload, settings: WorldSettings) -> None:
    """Raises ValueError for a run of more ticks or reports of an instance than can be paid for."""
    period_s = min(settings.tick_s, settings.telemetry_s)
    for stream in workload.streams:
        trace = stream.trace
        if trace.span_s > MOST_PERIODS * period_s:
            raise ValueError(
                f"the last request of {trace.name} arrives at {trace.span_s:g} s; at most "
                f"{MOST_PERIODS * period_s:g} s can be simulated at a tick of {settings.tick_s:g} s"
            )


def largest_request(profile: Profile, block_size: int = 1) -> int:
    """Tokens, prompt and output, that one request may hold in whole blocks."""
    return min(profile.kv_capacity_tokens // block_size * block_size, profile.max_model_len)


def _check_sizes(stream: Stream, profile: Profile, block_size: int) -> None:
    trace, room = stream.trace, largest_request(profile, block_size)
    prompts, outputs = _columns(stream)
    too_large = np.flatnonzero(prompts + outputs > room)
    if not len(too_large):
        return
    row = too_large[0]
    raise ValueError(
        f"{len(too_large)} of {_count(len(trace), 'request')} of {trace.name} do not fit on an instance: the "
        f"first, row {row + 1}, has {prompts[row]} prompt and {outputs[row]} output tokens, and "
        f"{profile.name} holds {room} a request"
    )


def _columns(stream: Stream) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.asarray(stream.trace.prompt_tokens, np.int64), np.asarray(stream.trace.output_tokens, np.int64)


def _check_interactive(stream: Stream, profile: Profile) -> list[str]:
    prompts, outputs = _columns(stream)
    itl = _Objective(
        "ITL SLO", stream.slo.itl_s, lambda context: profile.step_times.seconds(1, context, 0, 0), 1e3, "ms"
    )
    ttft = _Objective("TTFT SLO", stream.slo.ttft_s, lambda tokens: prefill_s(profile, tokens), 1.0, "s")
    remarks = []
    for objective, sizes in ((itl, prompts[outputs > 1]), (ttft, prompts)):
        remarks += objective.check(sizes, largest_request(profile), stream.trace.name, profile.name)
    return remarks


class _Objective:
    """A time that grows with the size of a request and must stay within `slo_s`."""

    def __init__(
        self, name: str, slo_s: float, seconds: Callable[[int], float], scale: float, unit: str
    ) -> None:
        self._name = name
        self._slo_s = slo_s
        self._seconds = seconds
        self._scale = scale
        self._unit = unit

    def check(self, sizes: NDArray[np.int64], limit: int, trace: str, profile: str) -> list[str]:
        """`sizes`: tokens of each request that has to meet it."""
        if not len(sizes) or self._seconds(int(sizes.max())) <= self._slo_s:
            return []
        slo, best_s = self._shown(self._slo_s), self._seconds(int(sizes.min()))
        if best_s > self._slo_s:
            raise ValueError(
                f"no instance of {profile} meets the interactive {self._name} of {slo} for any request of "
                f"{trace}; the best on offer is {self._shown(best_s)}, with one request alone on an instance"
            )
        most = self._largest_met(limit)
        missed = np.count_nonzero(sizes > most)
        return [
            f"{missed} of {_count(len(sizes), 'request')} of {trace} cannot meet the {self._name} of {slo} "
            f"even alone on an instance: it takes prompts of at most {most} tokens"
        ]

    def _largest_met(self, limit: int) -> int:
        low, high = 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self._seconds(middle) <= self._slo_s:
                low = middle
            else:
                high = middle - 1
        return low

    def _shown(self, seconds: float) -> str:
        return f"{seconds * self._scale:.4g} {self._unit}"


def _check_batch(stream: Stream, profile: Profile) -> list[str]:
    """Whether requests can be complete by their deadline, alone on an instance from their arrival."""
    trace, allowed = stream.trace, stream.completion_s
    prompts, outputs = _columns(stream)
    if _alone_s(profile, int(prompts.max()), int(outputs.max())) <= allowed:
        return []
    sizes, rows = np.unique(prompts, return_inverse=True)
    prefill = np.array([prefill_s(profile, int(size)) for size in sizes])
    step = np.array([profile.step_times.seconds(1, int(size), 0, 0) for size in sizes])
    own_s = prefill[rows] + (outputs - 1) * step[rows]
    if own_s.min() > allowed:
        raise ValueError(
            f"no instance of {profile.name} completes any request of {trace.name} within its deadline of "
            f"{allowed:.4g} s; the best on offer is {own_s.min():.4g} s, alone on an instance"
        )
    missed = np.count_nonzero(own_s > allowed)
    if not missed:
        return []
    return [
        f"{missed} of {_count(len(trace), 'request')} of {trace.name} cannot be complete within "
        f"{allowed:.4g} s even alone on an instance"
    ]


def _alone_s(profile: Profile, prompt: int, output: int) -> float:
    return prefill_s(profile, prompt) + (output - 1) * profile.step_times.seconds(1, prompt, 0, 0)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
