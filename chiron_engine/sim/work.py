"""How much of an instance's time requests take at least, whoever schedules them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chiron_engine.policy.iteration.request import SloClass

from .profile import Profile
from .step_grid import RequestSizes
from .step_prices import StepPrices, TokenCounts, best_prices
from .traces.columns import make_trace, outputs_of, prompts_of
from .traces.prefix_blocks import PrefixBlocks
from .traces.trace import Trace
from .workload import BATCH_SLO, INTERACTIVE_SLO, ClassSlo, Stream, Workload

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LATE_SHARE = 0.01
"""Share of its token gaps, rounded up, that an interactive request may have late and still attain."""


@dataclass(frozen=True, slots=True)
class RequestAmounts:
    """The fields of `TokenCounts` for every request of a stream, one column each."""

    columns: Floats


@dataclass(frozen=True, slots=True)
class Work:
    """Least seconds of an instance by request, for each stream of a workload, and the prices."""

    by_stream: tuple[Floats, ...]
    prices: StepPrices

    @property
    def total_s(self) -> float:
        return float(sum(seconds.sum() for seconds in self.by_stream))


def least_work(workload: Workload, profile: Profile, prices: StepPrices | None = None) -> Work:
    """Work of every request, at the prices at which the whole workload costs most, or at those given.

    The time all instances spend on any set of requests is at least the sum of their work: prompts
    cost their marginal time only and start from the longest prefix any earlier arrival had, the base of
    a step is shared as widely as KV capacity and ITL SLO allow (`StepPrices`), and nothing is computed
    twice. Step times are taken without noise.

    Raises ValueError if no step is within the interactive ITL SLO.
    """
    amounts = [amounts_of(stream) for stream in workload.streams]
    totals = TokenCounts(*np.sum([amount.columns.sum(axis=1) for amount in amounts], axis=0).tolist())
    if prices is None:
        itl_slo_s = workload.interactive.slo.itl_s if workload.interactive else 0.0
        prices = best_prices(profile, itl_slo_s, totals, _sizes(workload))
    column = np.array([getattr(prices, name) for name in TokenCounts.__slots__])
    return Work(tuple(column @ amount.columns for amount in amounts), prices)


def work_s(
    prompt_tokens: int, output_tokens: int, profile: Profile, slo: ClassSlo | None = None, batch: bool = False
) -> float:
    """Least seconds of one instance for one request among many of its like."""
    slo = slo or (BATCH_SLO if batch else INTERACTIVE_SLO)
    trace = make_trace("one request", [0.0], [prompt_tokens], [output_tokens])
    stream = Stream(SloClass.BATCH if batch else SloClass.INTERACTIVE, trace, slo, 0)
    return least_work(Workload(None, stream) if batch else Workload(stream, None), profile).total_s


def amounts_of(stream: Stream) -> RequestAmounts:
    """What there is to compute. The first output token comes with the prompt's last chunk; each
    further one is a decode with the KV of all before it. The context of prompt tokens is that of the
    smallest chunks, the cheapest. Batch work is never bound by its ITL SLO; an interactive request that
    attains has at least its shortest contexts on time."""
    prompts, outputs = prompts_of(stream.trace), outputs_of(stream.trace)
    decodes = outputs - 1
    on_time = np.zeros_like(decodes)
    if stream.slo_class is SloClass.INTERACTIVE:
        on_time = decodes - np.ceil(LATE_SHARE * decodes - 1e-9).astype(np.int64)
    on_time_context = on_time * prompts + on_time * (on_time - 1) // 2
    context = decodes * prompts + decodes * (decodes - 1) // 2
    cached = cached_prefixes(stream.trace)
    columns = (
        on_time,
        on_time_context,
        decodes - on_time,
        context - on_time_context,
        prompts - cached,
        (prompts * (prompts + 1) - cached * (cached + 1)) // 2,
    )
    return RequestAmounts(np.array(columns, dtype=np.float64))


def cached_prefixes(trace: Trace) -> Ints:
    """Tokens of each prompt that earlier rows had as a prefix, too: hits of an infinite cache. At
    least one token of every prompt is computed."""
    prompts = prompts_of(trace)
    if trace.prefix_blocks is None:
        return np.zeros_like(prompts)
    blocks = PrefixBlocks.of(trace.prefix_blocks)
    known = np.concatenate((_seen_before(blocks), [False]))
    run_ends = np.flatnonzero(~known)
    ends = np.minimum(run_ends[np.searchsorted(run_ends, blocks.starts[:-1])], blocks.starts[1:])
    return np.minimum((ends - blocks.starts[:-1]) * trace.prefix_block_tokens, prompts - 1)


def _seen_before(blocks: PrefixBlocks) -> NDArray[np.bool_]:
    """For each entry of `ids` whether an earlier row has it."""
    first_row = np.full(blocks.num_ids, len(blocks), dtype=np.int64)
    rows = blocks.row_of_each()
    np.minimum.at(first_row, blocks.ids, rows)
    return first_row[blocks.ids] < rows


def _sizes(workload: Workload) -> RequestSizes:
    traces = [stream.trace for stream in workload.streams]
    return RequestSizes(
        shortest=min(int(prompts_of(trace).min()) for trace in traces),
        longest=max(int((prompts_of(trace) + outputs_of(trace)).max()) for trace in traces),
        shares_prefixes=any(trace.prefix_blocks is not None for trace in traces),
    )
