"""Steps run before the first request: to warm up, to find the memory a full step takes, to time
recomputation against copies, and to know roughly what steps cost. They overwrite KV blocks, so only on
an executor not yet in use.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.plan import Chunk, DecodeBatch, Joined, StepPlan
from chiron_engine.policy.iteration.prefills import SCORED_TOKENS
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY, MAX_LOGPROBS, SamplingParams
from chiron_engine.policy.iteration.step_costs import StepCosts

from .guides import WORD_BITS, forbid
from .torch_executor import TorchExecutor

WARM_UP_TOKENS = 32
RECOMPUTED_TOKENS = 256
TIMED_REQUESTS = 8
SHORT_CONTEXT, LONG_CONTEXT = 32, 1024
SHORT_PROMPT, LONG_PROMPT = 16, 128
LEAST_STEP_S = 1e-6
DECODED = 2
"""Tokens that a timed request has room for beyond its context."""
LEAST_TOKENS = SHORT_CONTEXT + DECODED
# Exercises every stage of the sampler.
SAMPLED = SamplingParams(temperature=1.0, top_k=40, top_p=0.9)
# Logits are changed, and wanted as they were as well.
LARGEST = replace(
    SAMPLED, logit_bias={0: 1.0}, logprobs=MAX_LOGPROBS, prompt_logprobs=MAX_LOGPROBS, min_p=0.05
)


class TrialRequests:
    """Requests of equal length that take the first slots and blocks of an idle executor.

    Each has `known` tokens and room in its table for `known + room`. The first `sharers` of them begin with
    the same `shared` blocks.
    """

    def __init__(
        self,
        executor: TorchExecutor,
        count: int,
        known: int,
        room: int,
        sampling: SamplingParams = GREEDY,
        sharers: int = 0,
        shared: int = 0,
    ) -> None:
        shape = executor.shape
        width = -(-(known + room) // shape.block_size)
        tables = _tables(count, width, sharers, shared)
        needed = 1 + max(block for table in tables for block in table)
        if count > shape.max_slots or needed > shape.num_device_blocks:
            raise ValueError(
                f"{count} requests of {known + room} tokens need {count} slots and {needed} blocks; "
                f"there are {shape.max_slots} and {shape.num_device_blocks}"
            )
        self._executor = executor
        self._known = known
        tokens = [(7 * i + 1) % shape.vocab_size for i in range(known)]
        self._joined = [
            Joined(slot, Request(slot, tokens, sampling, room), tokens, 0, blocks)
            for slot, blocks in enumerate(tables)
        ]
        self._decode = DecodeBatch(tuple(j.request for j in self._joined), tuple(range(count)))
        self._has_joined = False

    def prefill(self, start: int = 0, end: int | None = None, scored: int = 0) -> float:
        """Compute tokens [start, end) of every request in one step, as if the KV before them were there, and
        sample where that is all it knows, as without an end; returns the step's seconds on the device.
        scored: how many of the tokens, the first, are to tell how likely those after them were."""
        plan = StepPlan(0, chunk_requests=[j.request for j in self._joined])
        if not self._has_joined:
            plan.joined, self._has_joined = self._joined, True
        end = self._known if end is None else end
        plan.chunks = [
            Chunk(j.slot, start, end - start, end == self._known, start, start + scored) for j in self._joined
        ]
        return self._run(plan)

    def decode(self) -> float:
        """One token for every request; returns the step's seconds on the device."""
        return self._run(StepPlan(0, decode=self._decode))

    def leave(self) -> None:
        """Give the slots back."""
        self._run(StepPlan(0, left=[j.slot for j in self._joined]))

    def _run(self, plan: StepPlan) -> float:
        return self._executor.collect(self._executor.submit(plan)).device_s


def _tables(count: int, width: int, sharers: int, shared: int) -> list[list[int]]:
    """Block tables of requests that take the first blocks there are: those that are shared, then each
    request's own."""
    free = iter(range(shared if sharers else 0, count * width + 1))
    common = list(range(shared))
    return [
        [*common, *islice(free, width - shared)] if slot < sharers else list(islice(free, width))
        for slot in range(count)
    ]


def warm_up(executor: TorchExecutor) -> None:
    """A prompt and up to two more steps for it, greedy and with the sampler's every stage: what is
    built or tuned at first use is then ready."""
    shape = executor.shape
    known = min(WARM_UP_TOKENS, shape.max_step_tokens, shape.max_model_len - 1)
    room = min(2, shape.max_model_len - known)
    for sampling in (GREEDY, SAMPLED):
        trial = TrialRequests(executor, 1, known, room, sampling)
        trial.prefill()
        for _ in range(room):
            trial.decode()
        trial.leave()


def run_largest_step(executor: TorchExecutor) -> None:
    """The steps that need most memory besides attention over long contexts, and penalties for them: as many
    tokens as fit, in as many requests, all sampled with every filter and scored; one more token for each; and
    a guide for every row."""
    shape = executor.shape
    count = shape.max_slots
    known = max(min(shape.max_step_tokens // count, shape.max_model_len - 1), 1)
    trial = TrialRequests(executor, count, known, 1, LARGEST)
    trial.prefill(scored=min(known - 1, -(-SCORED_TOKENS // count)))
    trial.decode()
    trial.leave()
    logits = torch.zeros(count, shape.vocab_size, device=executor.device)
    masks = np.zeros((count, -(-shape.vocab_size // WORD_BITS)), np.int32)
    forbid(logits, None, masks, executor.model.kernels)


def measure_swap_costs(executor: TorchExecutor, costs: StepCosts | None = None) -> SwapCosts:
    """Time copies of a block each way and the recomputation of a token, for the choice between
    saving a preempted request and computing it again. Defaults where there is no host pool. costs: of
    steps, where they have been timed: they say what recomputation takes, and no step is run for it."""
    if executor.transfer is None:
        return SwapCosts()
    times = executor.transfer.measure()
    if costs is None:
        return SwapCosts(times.out_s, times.in_s, _recompute_seconds(executor))
    chunk = _recomputed_tokens(executor)
    return SwapCosts(times.out_s, times.in_s, costs.seconds(0, 0, chunk) / chunk)


def _recomputed_tokens(executor: TorchExecutor) -> int:
    """Tokens of the chunk that recomputation is judged by: RECOMPUTED_TOKENS or what fits."""
    shape = executor.shape
    room = min(shape.max_model_len, shape.num_device_blocks * shape.block_size) - 1
    return min(RECOMPUTED_TOKENS, shape.max_step_tokens, room)


def _recompute_seconds(executor: TorchExecutor) -> float:
    """Seconds a prompt token takes in such a chunk, the best of two."""
    known = _recomputed_tokens(executor)
    trial = TrialRequests(executor, 1, known, 1)
    start = time.perf_counter()
    best = trial.prefill()
    if time.perf_counter() - start < 1.0:
        best = min(best, trial.prefill())
    trial.leave()
    return best / known


def measure_step_costs(executor: TorchExecutor) -> StepCosts:
    """What steps cost, from the times of five: a start for whoever then learns from real ones.

    Lengths that the executor does not hold are cut to what it does.
    """
    shape = executor.shape
    n = min(TIMED_REQUESTS, shape.max_slots, shape.num_device_blocks)
    while n > 1 and shape.num_device_blocks // n * shape.block_size < LEAST_TOKENS:
        n -= 1
    room = min(shape.max_model_len, shape.num_device_blocks // n * shape.block_size) - DECODED
    if room < 1:
        return StepCosts(max(LEAST_STEP_S, _prefill_s(executor, 1)))
    short, long = min(SHORT_CONTEXT, room), min(LONG_CONTEXT, room)
    one, many, full = (_decode_s(executor, *load) for load in ((1, short), (n, short), (n, long)))
    per_kv_token = max(0.0, full - many) / max(1, n * (long - short))
    per_request = max(0.0, (many - one) / max(1, n - 1) - per_kv_token * short)
    base = max(LEAST_STEP_S, one - per_request - per_kv_token * short)
    most = min(room, shape.max_step_tokens)
    first, second = min(SHORT_PROMPT, most), min(LONG_PROMPT, most)
    slower = _prefill_s(executor, second) - _prefill_s(executor, first)
    return StepCosts(base, per_request, per_kv_token, max(0.0, slower) / max(1, second - first))


def _decode_s(executor: TorchExecutor, requests: int, context: int) -> float:
    """Seconds of a step in which so many requests with this context decode. What their KV holds does
    not matter."""
    trial = TrialRequests(executor, requests, context, DECODED)
    trial.prefill(start=context - 1)
    seconds = trial.decode()
    trial.leave()
    return seconds


def _prefill_s(executor: TorchExecutor, tokens: int) -> float:
    trial = TrialRequests(executor, 1, tokens, 1)
    seconds = trial.prefill()
    trial.leave()
    return seconds
