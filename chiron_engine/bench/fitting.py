"""Requests of a workload made to fit the context of the model that answers them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from chiron_engine.sim.traces.columns import arrivals_of, make_trace, outputs_of, prompts_of
from chiron_engine.sim.traces.trace import Trace
from chiron_engine.sim.workload import Stream, Workload


@dataclass(frozen=True, slots=True)
class Clipped:
    """How many requests have a shorter prompt or a shorter output than their trace says."""

    prompts: int
    outputs: int


def map_streams(workload: Workload, change: Callable[[Stream], Trace]) -> Workload:
    """The workload with other traces. Deadlines stay what they were."""
    interactive, batch = workload.interactive, workload.batch
    if interactive is not None:
        interactive = replace(interactive, trace=change(interactive))
    if batch is not None:
        slo = replace(batch.slo, completion_s=batch.completion_s)
        first_id = len(interactive.trace) if interactive else 0
        batch = replace(batch, trace=change(batch), slo=slo, first_id=first_id)
    return Workload(interactive, batch)


def fit_context(workload: Workload, max_model_len: int) -> tuple[Workload, Clipped]:
    """The workload with prompt and output of each request within `max_model_len` together.

    An output gives way to its prompt, but keeps up to half of the context: without that a prompt
    longer than the context would leave nothing to measure. Raises ValueError for a context of less
    than two tokens.
    """
    if max_model_len < 2:
        raise ValueError(f"the context holds {max_model_len} tokens; a request takes at least 2")
    prompts = outputs = 0

    def fit(stream: Stream) -> Trace:
        nonlocal prompts, outputs
        trace = stream.trace
        asked_prompt, asked_output = prompts_of(trace), outputs_of(trace)
        left = np.maximum(max_model_len - asked_prompt, max_model_len // 2)
        output = np.minimum(asked_output, left)
        prompt = np.minimum(asked_prompt, max_model_len - output)
        prompts += int(np.count_nonzero(prompt < asked_prompt))
        outputs += int(np.count_nonzero(output < asked_output))
        return make_trace(
            trace.name, arrivals_of(trace), prompt, output, trace.prefix_blocks, trace.prefix_block_tokens
        )

    return map_streams(workload, fit), Clipped(prompts, outputs)
