"""What the columns of a run say: outcomes by request as the simulator states them, gaps, latencies."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chiron_engine.policy.iteration.request import SloClass
from chiron_engine.sim.attainment import rows
from chiron_engine.sim.run_result import ItlHistogram, Outcome, RequestColumns, RunResult
from chiron_engine.sim.token_gaps import TOLERANCE
from chiron_engine.sim.traces.columns import take_rows
from chiron_engine.sim.workload import Stream, Workload

from .request_log import RequestLog

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Gaps:
    """Inter-token latencies of one class: each token but the first of its request, seconds since the
    token before, and when it came. Tokens of one chunk came at once: gaps of 0."""

    seconds: Floats
    at_s: Floats


@dataclass(frozen=True, slots=True)
class Measured:
    """A run in the terms of the simulator's accounting, over the requests that were sent.

    `result.workload` holds those, their arrivals being when they were sent, so that TTFT and
    deadlines count from there. lag_s: how much later than due each was sent. ended_s: when its call
    ended, NaN where it was stopped.
    """

    result: RunResult
    gaps: dict[SloClass, Gaps]
    lag_s: Floats
    ended_s: Floats
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    cached_tokens: int
    errors: dict[str, int]


def measure(workload: Workload, log: RequestLog, wall_s: float) -> Measured | None:
    """None where nothing was sent. wall_s: how long the run took."""
    sent_workload, kept = _sent(workload, log)
    if sent_workload is None:
        return None
    renumbered = np.full(len(log.sent_s), -1)
    renumbered[kept] = np.arange(len(kept))
    chunks = _Chunks(log, renumbered)
    count = len(kept)
    columns = RequestColumns(
        outcome=_column("b", np.asarray(log.outcome)[kept]),
        first_token_s=_column("d", chunks.firsts(count)),
        last_token_s=_column("d", chunks.lasts(count)),
        late_gaps=_column("i", chunks.late_gaps(sent_workload)),
        evictions=_column("i", np.asarray(log.preemptions)[kept]),
        served=_column("i", np.asarray(log.outcome)[kept] == Outcome.FINISHED),
        output_tokens=_column("i", np.asarray(log.output_tokens)[kept]),
    )
    return Measured(
        result=RunResult(sent_workload, columns, [], [], ItlHistogram(), end_s=wall_s),
        gaps={stream.slo_class: chunks.gaps(stream) for stream in sent_workload.streams},
        lag_s=(np.asarray(log.sent_s) - np.asarray(log.due_s))[kept],
        ended_s=np.asarray(log.ended_s)[kept],
        prompt_tokens=sum(sum(stream.trace.prompt_tokens) for stream in sent_workload.streams),
        output_tokens=sum(log.output_tokens),
        preemptions=sum(log.preemptions),
        cached_tokens=sum(log.cached_tokens),
        errors=dict(sorted(log.errors.items())),
    )


def _sent(workload: Workload, log: RequestLog) -> tuple[Workload | None, Ints]:
    """The requests that were sent, arriving when they were, and their ids in the whole workload.
    Requests of a stream are sent in its order, so those of a stopped run are its first ones."""
    kept: list[Ints] = []
    streams: dict[SloClass, Stream] = {}
    for stream in workload.streams:
        sent_s = rows(log.sent_s, stream)
        count = int(np.count_nonzero(~np.isnan(sent_s)))
        if not count:
            continue
        trace = take_rows(stream.trace, np.arange(count), sent_s[:count])
        slo = replace(stream.slo, completion_s=stream.completion_s)
        first_id = sum(map(len, kept))
        streams[stream.slo_class] = Stream(stream.slo_class, trace, slo, first_id)
        kept.append(stream.first_id + np.arange(count))
    if not streams:
        return None, np.zeros(0, dtype=np.int64)
    sent = Workload(streams.get(SloClass.INTERACTIVE), streams.get(SloClass.BATCH))
    return sent, np.concatenate(kept)


class _Chunks:
    """All chunks, ordered by request and then by time."""

    def __init__(self, log: RequestLog, renumbered: Ints) -> None:
        request = renumbered[np.asarray(log.chunk_request, dtype=np.int64)]
        order = np.argsort(request, kind="stable")
        self.request = request[order]
        self.at_s = np.asarray(log.chunk_s, dtype=np.float64)[order]
        self.tokens = np.asarray(log.chunk_tokens, dtype=np.int64)[order]
        changes = self.request[1:] != self.request[:-1]
        edge = np.ones(min(1, len(self.request)), dtype=bool)
        self.is_first = np.concatenate((edge, changes))
        self.is_last = np.concatenate((changes, edge))
        self.gap_s = np.diff(self.at_s, prepend=0.0)  # of no meaning where is_first

    def firsts(self, requests: int) -> Floats:
        return self._of_requests(self.is_first, requests)

    def lasts(self, requests: int) -> Floats:
        return self._of_requests(self.is_last, requests)

    def _of_requests(self, chosen: NDArray[np.bool_], requests: int) -> Floats:
        times = np.full(requests, np.nan)
        times[self.request[chosen]] = self.at_s[chosen]
        return times

    def late_gaps(self, workload: Workload) -> Ints:
        """By request; only gaps between chunks can be late."""
        limits = np.concatenate([np.full(len(s.trace), s.slo.itl_s * TOLERANCE) for s in workload.streams])
        late = ~self.is_first & (self.gap_s > limits[self.request])
        return np.bincount(self.request[late], minlength=len(limits))

    def gaps(self, stream: Stream) -> Gaps:
        own = (self.request >= stream.first_id) & (self.request < stream.first_id + len(stream.trace))
        between = own & ~self.is_first
        inside = np.repeat(self.at_s[own], self.tokens[own] - 1)
        seconds = np.concatenate((self.gap_s[between], np.zeros(len(inside))))
        return Gaps(seconds, np.concatenate((self.at_s[between], inside)))


def _column(typecode: str, values: np.ndarray) -> array:
    return array(typecode, values.tolist())
