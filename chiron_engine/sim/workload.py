"""What a simulation serves: traces by class, each with its service level objectives."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import merge

from chiron_engine.policy.iteration.request import SloClass

from .traces.trace import Trace


@dataclass(frozen=True, slots=True)
class ClassSlo:
    """Objectives of one class, in seconds. completion_s: batch only, from arrival to the last
    token; None means TTFT SLO + mean output x ITL SLO."""

    ttft_s: float
    itl_s: float
    completion_s: float | None = None


INTERACTIVE_SLO = ClassSlo(ttft_s=10.0, itl_s=0.2)
BATCH_SLO = ClassSlo(ttft_s=3600.0, itl_s=2.0)


@dataclass(frozen=True, slots=True)
class Stream:
    """One class of the workload. Its request ids are first_id, first_id + 1, ... by row."""

    slo_class: SloClass
    trace: Trace
    slo: ClassSlo
    first_id: int

    @property
    def completion_s(self) -> float:
        """Seconds a batch request may take from arrival to its last token."""
        if self.slo.completion_s is not None:
            return self.slo.completion_s
        mean_output = sum(self.trace.output_tokens) / max(1, len(self.trace))
        return self.slo.ttft_s + mean_output * self.slo.itl_s


@dataclass(frozen=True, slots=True)
class Workload:
    """Interactive requests and batch requests; either may be missing."""

    interactive: Stream | None
    batch: Stream | None

    @property
    def streams(self) -> tuple[Stream, ...]:
        return tuple(stream for stream in (self.interactive, self.batch) if stream is not None)

    @property
    def num_requests(self) -> int:
        return sum(len(stream.trace) for stream in self.streams)

    def arrivals(self) -> Iterator[tuple[float, int, Stream, int]]:
        """(arrival, request id, stream, row) in order of time."""
        return merge(*(self._rows(stream) for stream in self.streams), key=lambda entry: entry[:2])

    @staticmethod
    def _rows(stream: Stream) -> Iterator[tuple[float, int, Stream, int]]:
        for row, arrival in enumerate(stream.trace.arrival_s):
            yield arrival, stream.first_id + row, stream, row


def make_workload(
    interactive: Trace | None,
    batch: Trace | None,
    interactive_slo: ClassSlo = INTERACTIVE_SLO,
    batch_slo: ClassSlo = BATCH_SLO,
) -> Workload:
    """Raises ValueError without any request."""
    if not (interactive or batch):
        raise ValueError("the workload is empty; give an interactive trace, a batch trace or both")
    first = Stream(SloClass.INTERACTIVE, interactive, interactive_slo, 0) if interactive else None
    offset = len(interactive) if interactive else 0
    second = Stream(SloClass.BATCH, batch, batch_slo, offset) if batch else None
    return Workload(first, second)


def capped_outputs(workload: Workload, max_output_tokens: int) -> Workload:
    """The workload as it is served where no request may have more output than that: what bounds and
    demands have to count. Deadlines stay as they were."""
    capped = [_capped(stream, max_output_tokens) for stream in workload.streams]
    by_class = {stream.slo_class: stream for stream in capped}
    return Workload(by_class.get(SloClass.INTERACTIVE), by_class.get(SloClass.BATCH))


def _capped(stream: Stream, most: int) -> Stream:
    outputs = array("i", (min(tokens, most) for tokens in stream.trace.output_tokens))
    slo = stream.slo
    if stream.slo_class is SloClass.BATCH:
        slo = replace(slo, completion_s=stream.completion_s)
    return replace(stream, trace=replace(stream.trace, output_tokens=outputs), slo=slo)
