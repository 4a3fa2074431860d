"""Workloads and logs of runs without a server, for tests of what is made of them."""

from __future__ import annotations

from array import array

from chiron_engine.bench.request_log import RequestLog
from chiron_engine.sim.traces.trace import Trace
from chiron_engine.sim.workload import ClassSlo, Workload, make_workload

SLO = ClassSlo(ttft_s=1.0, itl_s=0.1)
BATCH_SLO = ClassSlo(ttft_s=1.0, itl_s=0.1, completion_s=2.0)


def trace(arrivals: list[float], prompts: list[int], outputs: list[int], **more: object) -> Trace:
    return Trace("made", array("d", arrivals), array("i", prompts), array("i", outputs), **more)  # type: ignore[arg-type]


def workload(interactive: Trace | None, batch: Trace | None = None) -> Workload:
    return make_workload(interactive, batch, SLO, BATCH_SLO)


def served(log: RequestLog, request: int, due_s: float, sent_s: float, tokens: list[float]) -> None:
    """A request that finished; a token at each of the times, those at equal times in one chunk."""
    log.sent(request, due_s, sent_s)
    for time_s in sorted(set(tokens)):
        log.tokens(request, time_s, tokens.count(time_s))
    log.finished(request, max(tokens), preemptions=0, cached_tokens=0)
