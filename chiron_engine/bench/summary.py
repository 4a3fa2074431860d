"""One run against a server in figures: the JSON of `chiron bench`."""

from __future__ import annotations

from typing import Any

import numpy as np

from chiron_engine.policy.iteration.request import SloClass
from chiron_engine.sim.attainment import attained_rows, percentile, rows
from chiron_engine.sim.run_result import Outcome
from chiron_engine.sim.summary import rounded, slo_figures
from chiron_engine.sim.traces.dispersion import dispersion
from chiron_engine.sim.workload import Stream

from .measured import Gaps, Measured

LAG_WARNING_MS = 10.0
BUSY_WARNING = 0.8


def bench_summary(measured: Measured, *, cpu_s: float, **more: Any) -> dict[str, Any]:
    """The keys that `chiron simulate` writes too, and those of a client's view; None where a class has
    no requests. What only a server knows, as instances and GPU-hours, is left out. `more` is appended.

    cpu_s: of this process during the run.
    """
    result, wall_s = measured.result, measured.result.end_s
    streams = result.workload.streams
    classes = {stream.slo_class.name.lower(): class_figures(measured, stream) for stream in streams}
    interactive = measured.gaps.get(SloClass.INTERACTIVE)
    figures = {
        "trace": {s.slo_class.name.lower(): s.trace.name for s in streams},
        "requests": result.workload.num_requests,
        **slo_figures(result),
        "itl_ms": _itl_ms(interactive),
        "finished": sum(entry["finished"] for entry in classes.values()),
        "rejected": sum(entry["rejected"] for entry in classes.values()),
        "lost": sum(entry["lost"] for entry in classes.values()),
        "stopped": sum(entry["stopped"] for entry in classes.values()),
        "errors": measured.errors,
        "throughput_rps": sum(entry["throughput_rps"] for entry in classes.values()),
        "goodput_rps": sum(entry["goodput_rps"] for entry in classes.values()),
        "output_tokens_per_s": measured.output_tokens / max(wall_s, 1e-9),
        "prompt_tokens": measured.prompt_tokens,
        "output_tokens": measured.output_tokens,
        "cached_tokens": measured.cached_tokens,
        "preemptions": measured.preemptions,
        "wall_s": wall_s,
        "lag_ms": lag_ms(measured),
        "client_cpu_s": cpu_s,
        "classes": classes,
        "index_of_dispersion": {s.slo_class.name.lower(): dispersion(s.trace) for s in streams},
        **more,
    }
    return {key: rounded(value) for key, value in figures.items()}


def class_figures(measured: Measured, stream: Stream) -> dict[str, Any]:
    """Of one class, over the requests of it that were sent. Latencies of those that finished or got
    as far; e2e_s of those that finished."""
    columns, wall_s = measured.result.requests, measured.result.end_s
    outcome = rows(columns.outcome, stream)
    sent_s = np.asarray(stream.trace.arrival_s)
    finished, stopped = outcome == Outcome.FINISHED, np.isnan(rows(measured.ended_s, stream))
    ttft_s = rows(columns.first_token_s, stream) - sent_s
    e2e_s = (rows(columns.last_token_s, stream) - sent_s)[finished]
    attained = attained_rows(measured.result, stream)
    return {
        "requests": len(stream.trace),
        "finished": int(np.count_nonzero(finished)),
        "rejected": int(np.count_nonzero(outcome == Outcome.REJECTED)),
        "lost": int(np.count_nonzero((outcome == Outcome.UNFINISHED) & ~stopped)),
        "stopped": int(np.count_nonzero(stopped)),
        "slo_attainment": float(np.count_nonzero(attained)) / len(stream.trace),
        "ttft_s": _p50_p99(ttft_s),
        "itl_ms": _itl_ms(measured.gaps[stream.slo_class]),
        "e2e_s": _p50_p99(e2e_s),
        "throughput_rps": float(np.count_nonzero(finished)) / max(wall_s, 1e-9),
        "goodput_rps": float(np.count_nonzero(attained)) / max(wall_s, 1e-9),
        "output_tokens": int(rows(columns.output_tokens, stream).sum()),
    }


def _itl_ms(gaps: Gaps | None) -> dict[str, float | None]:
    return _p50_p99(np.zeros(0) if gaps is None else gaps.seconds * 1e3)


def _p50_p99(values: np.ndarray) -> dict[str, float | None]:
    return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}


def lag_ms(measured: Measured) -> dict[str, float | None]:
    """How much later than due requests were sent."""
    lag = measured.lag_s * 1e3
    return {**_p50_p99(lag), "max": float(lag.max())}


def warnings(summary: dict[str, Any]) -> list[str]:
    """What makes the figures of a run doubtful."""
    found = []
    lag = summary["lag_ms"]["p99"]
    if lag > LAG_WARNING_MS:
        found.append(
            f"1 % of the requests were sent {lag:.0f} ms late or more (over {LAG_WARNING_MS:.0f} ms):"
            " this machine could not keep the trace's times; give it fewer requests or more cores"
        )
    share = summary["client_cpu_s"] / max(summary["wall_s"], 1e-9)
    if share > BUSY_WARNING:
        found.append(
            f"the generator itself was busy for {share:.0%} of the run: latencies include its own delay"
        )
    return found
