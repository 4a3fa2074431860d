"""One simulation in figures: the JSON of `chiron simulate`."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate
from typing import Any

from chiron_engine.policy.iteration.request import SloClass

from .attainment import attainment, ttft_percentile
from .run_result import ITL_FIRST_S, ITL_RATIO, InstanceLife, ItlHistogram, Outcome, RunResult
from .traces.dispersion import dispersion

SIGNIFICANT_DIGITS = 9


def summary(
    result: RunResult,
    bound_gpu_hours: float | None,
    *,
    policy: str,
    profile: str,
    wall_s: float,
    **more: Any,
) -> dict[str, Any]:
    """The keys of the project's reports, and those that explain them; None where a class has no
    requests. Equal runs give equal values but for `wall_s`. `more` is appended."""
    figures = {
        "policy": policy,
        "trace": {s.slo_class.name.lower(): s.trace.name for s in result.workload.streams},
        "profile": profile,
        "requests": result.workload.num_requests,
        **slo_figures(result),
        "gpu_hours": gpu_hours(result),
        "lower_bound_gpu_hours": bound_gpu_hours,
        "peak_instances": peak_instances(result.instances),
        "scaling_actions": result.scaling_actions,
        "preemptions": result.preemptions,
        "throughput_rps": result.requests.outcome.count(Outcome.FINISHED) / max(result.end_s, 1e-9),
        "wall_s": wall_s,
        "simulated_s": result.end_s,
        "role_changes": result.role_changes,
        "launches": result.launches,
        "failed_launches": result.failed_launches,
        "lost_instances": result.lost_instances,
        "steps": result.steps,
        "extrapolated_steps": result.extrapolated_steps,
        "index_of_dispersion": {
            s.slo_class.name.lower(): dispersion(s.trace) for s in result.workload.streams
        },
        **more,
    }
    return {key: rounded(value) for key, value in figures.items()}


def rounded(value: Any) -> Any:
    """Floats to SIGNIFICANT_DIGITS, so that sums in another order print the same; not a number is None."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None


def slo_figures(result: RunResult) -> dict[str, Any]:
    """Attainment by class and latencies of interactive requests, by the keys of the reports."""
    by_class = attainment(result)
    classes = {slo_class.name.lower(): by_class.get(slo_class) for slo_class in SloClass}
    return {
        "requests_by_class": {name: a.requests if a else 0 for name, a in classes.items()},
        "slo_attainment": {name: a.share if a else None for name, a in classes.items()},
        "slo_misses": {name: a.misses if a else None for name, a in classes.items()},
        "ttft_s": {"p50": ttft_percentile(result, 0.5), "p99": ttft_percentile(result, 0.99)},
        "itl_ms": {"p50": itl_ms(result.itl, 0.5), "p99": itl_ms(result.itl, 0.99)},
    }


def itl_ms(histogram: ItlHistogram, share: float) -> float | None:
    """Quantile in milliseconds, interpolated within its bin on a logarithmic scale."""
    cumulative = list(accumulate(histogram.counts))
    if not cumulative or not cumulative[-1]:
        return None
    wanted = share * cumulative[-1]
    place = min(bisect_right(cumulative, wanted), len(cumulative) - 1)
    inside = (wanted - (cumulative[place] - histogram.counts[place])) / max(1, histogram.counts[place])
    return 1e3 * ITL_FIRST_S * ITL_RATIO ** (place + min(1.0, inside))


def gpu_hours(result: RunResult) -> float:
    """GPUs x (launch decision to process exit), at most to the last completion: loading, idle,
    draining, failed and lost instances included."""
    return sum(_gpu_seconds(life, result.end_s) for life in result.instances) / 3600.0


def _gpu_seconds(life: InstanceLife, end_s: float) -> float:
    exited = end_s if math.isnan(life.exited_s) else min(life.exited_s, end_s)
    return life.gpus * max(0.0, exited - life.launched_s)


def peak_instances(instances: list[InstanceLife]) -> int:
    """Most instances alive at once, loading and draining ones included."""
    changes = [(life.launched_s, 1) for life in instances]
    changes += [(life.exited_s, -1) for life in instances if not math.isnan(life.exited_s)]
    return max(accumulate((change for _, change in sorted(changes)), initial=0))
