"""Which requests met their service level objectives, over all that were submitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chiron_engine.policy.iteration.request import Slo, SloClass

from .run_result import Outcome, RequestColumns, RunResult
from .workload import Stream

TOLERANCE_S = 1e-9
"""Times are sums of floats; a token due now and delivered now is on time."""
MISS_REASONS = ("rejected", "unfinished", "ttft", "gaps", "late_end", "deadline")


def allowed_late_gaps(output_tokens: int) -> int:
    """One per cent of the gaps between the tokens of one output, rounded up."""
    return (max(0, output_tokens - 1) + 99) // 100


def interactive_attained(
    slo: Slo, arrival: float, first_token: float, last_token: float, output_tokens: int, late_gaps: int
) -> bool:
    """Time to first token within its SLO, at most 1 % of the gaps late, and the last token by
    arrival + TTFT SLO + (n - 1) x ITL SLO."""
    end = slo.ttft_s + (output_tokens - 1) * slo.itl_s
    return (
        first_token - arrival <= slo.ttft_s + TOLERANCE_S
        and late_gaps <= allowed_late_gaps(output_tokens)
        and last_token - arrival <= end + TOLERANCE_S
    )


@dataclass(frozen=True, slots=True)
class Attainment:
    """One class. misses: requests by the first of MISS_REASONS that applies."""

    requests: int
    attained: int
    misses: dict[str, int]

    @property
    def share(self) -> float:
        return self.attained / self.requests


def attainment(result: RunResult) -> dict[SloClass, Attainment]:
    """By class, for those that have requests."""
    return {
        stream.slo_class: _count(_failing(result.requests, stream), len(stream.trace))
        for stream in result.workload.streams
    }


def attained_rows(result: RunResult, stream: Stream) -> np.ndarray:
    """For each request of a stream, whether it met its SLO."""
    return ~np.logical_or.reduce(list(_failing(result.requests, stream).values()))


def rows(column: object, stream: Stream) -> np.ndarray:
    """The part of a column that belongs to the requests of a stream."""
    return np.asarray(column)[stream.first_id : stream.first_id + len(stream.trace)]


def _failing(columns: RequestColumns, stream: Stream) -> dict[str, np.ndarray]:
    """By reason, which requests it applies to."""
    outcome = rows(columns.outcome, stream)
    arrival = np.asarray(stream.trace.arrival_s)
    took_s = rows(columns.last_token_s, stream) - arrival
    failing = {"rejected": outcome == Outcome.REJECTED, "unfinished": outcome == Outcome.UNFINISHED}
    if stream.slo_class is SloClass.INTERACTIVE:
        gaps = np.maximum(rows(columns.output_tokens, stream).astype(np.int64) - 1, 0)
        end_s = stream.slo.ttft_s + gaps * stream.slo.itl_s
        failing["ttft"] = rows(columns.first_token_s, stream) - arrival > stream.slo.ttft_s + TOLERANCE_S
        failing["gaps"] = rows(columns.late_gaps, stream) > (gaps + 99) // 100
        failing["late_end"] = took_s > end_s + TOLERANCE_S
    else:
        failing["deadline"] = took_s > stream.completion_s + TOLERANCE_S
    return failing


def _count(failing: dict[str, np.ndarray], requests: int) -> Attainment:
    fine = np.ones(requests, dtype=bool)
    misses = {}
    for reason, fails in failing.items():
        misses[reason] = int(np.count_nonzero(fails & fine))
        fine &= ~fails
    return Attainment(requests, int(np.count_nonzero(fine)), misses)


def percentile(values: np.ndarray, share: float) -> float | None:
    """Linear between order statistics; None of nothing."""
    values = values[~np.isnan(values)]
    return float(np.quantile(values, share)) if len(values) else None


def ttft_percentile(result: RunResult, share: float) -> float | None:
    """Seconds, over interactive requests that have a first token."""
    stream = result.workload.interactive
    if stream is None:
        return None
    first = rows(result.requests.first_token_s, stream)
    return percentile(first - np.asarray(stream.trace.arrival_s), share)
