"""Biases, bans and penalties against plain computations, through the whole engine: chunks, batch-mates,
evictions and a second engine that goes on leave them alone."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from chiron_kernels.gpu import penalties
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.plan import TokenLogprobs
from chiron_engine.policy.iteration.request import FinishReason, Request
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.runtime.logit_adjustments import AdjustmentTable, penalty_bytes
from chiron_engine.runtime.sampler import SamplingTable, sample
from chiron_engine.runtime.torch_executor import TorchExecutor
from tests.runtime.tiny_causal_lm import CONTEXT, VOCAB, TinyCausalLM

CPU = torch.device("cpu")
NEAR_TIE = 1e-3
END = 7


def adjusted(logits: Tensor, request: Request, output: list[int]) -> Tensor:
    """[vocab], by transformers' processors where it has them, and by the formulas of OpenAI's reference
    for the other two. request: as it came first."""
    params, prompt = request.sampling, list(request.prompt_ids)
    ids, scores = torch.tensor([[*prompt, *output]]), logits[None].clone()
    if params.logit_bias:
        bias = {(token,): float(value) for token, value in params.logit_bias.items()}
        scores = SequenceBiasLogitsProcessor(bias)(ids, scores)
    if params.min_tokens:
        ends = sorted(request.stop_ids)
        scores = MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, ends)(ids, scores)
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token, count in Counter(output).items():
        scores[0, token] -= params.frequency_penalty * count + params.presence_penalty
    return scores[0]


def sampling_params() -> st.SearchStrategy[SamplingParams]:
    def build(**fields: object) -> SamplingParams:
        return SamplingParams(max_tokens=30, **fields)  # type: ignore[arg-type]

    return st.builds(
        build,
        temperature=st.just(0.0),
        repetition_penalty=st.sampled_from([1.0, 0.6, 1.3, 3.0]),
        presence_penalty=st.sampled_from([0.0, -1.5, 0.7, 2.0]),
        frequency_penalty=st.sampled_from([0.0, -0.5, 0.4, 2.0]),
        min_tokens=st.sampled_from([0, 0, 5, 30]),
        logit_bias=st.dictionaries(
            st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 2.5, 100.0]), max_size=5
        ),
    )


@settings(max_examples=60, deadline=None)
@given(params=st.lists(sampling_params(), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_rows_are_changed_as_plain_computations_do(params: list[SamplingParams], seed: int) -> None:
    """Several steps of rows that were there before, some of them with output of other engines."""
    rng, vocab = random.Random(seed), 40
    params = [replace(each, logit_bias={t % vocab: b for t, b in each.logit_bias.items()}) for each in params]
    table = AdjustmentTable(8, 64, CPU)
    slots = rng.sample(range(8), len(params))
    requests, outputs = [], []
    for slot, each in zip(slots, params, strict=True):
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, 9))]
        prior = [rng.randrange(vocab) for _ in range(rng.randint(0, 4))]
        requests.append(Request(slot, prompt, each, 30, frozenset({END, 9})))
        outputs.append(prior)
        remaining = replace(each, min_tokens=max(0, each.min_tokens - len(prior)))
        joined = Request(slot, [*prompt, *prior], remaining, 30, frozenset({END, 9}))
        joined.num_prior_outputs = len(prior)
        table.set(slot, joined, torch.tensor(joined.prompt_ids, dtype=torch.int64).numpy())
    last_tokens = torch.zeros(8, dtype=torch.int64)
    for step in range(4):
        decodes = len(slots) if step else 0  # first they are prompts
        rows = table.rows(torch.tensor(slots).numpy(), decodes)
        logits = torch.randn(len(slots), vocab, generator=torch.Generator().manual_seed(seed + step)) * 3
        lengths = [len(r.prompt_ids) + len(o) for r, o in zip(requests, outputs, strict=True)]
        expected = torch.stack(
            [adjusted(row, r, o) for row, r, o in zip(logits, requests, outputs, strict=True)]
        )
        if rows is not None:
            rows.apply(logits, torch.tensor(lengths), last_tokens, max(lengths) + rng.randint(0, 3))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
        for slot, output in zip(slots, outputs, strict=True):
            output.append(rng.randrange(vocab))
            last_tokens[slot] = output[-1]


@settings(max_examples=50, deadline=None)
@given(min_p=st.floats(0.0, 1.0), temperature=st.floats(0.2, 3.0), seed=st.integers(0, 1000))
def test_min_p_keeps_what_transformers_keeps(min_p: float, temperature: float, seed: int) -> None:
    """No token outside is drawn in many draws, and the least likely one inside is drawn with it alone."""
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(seed)) * 2
    odds = torch.softmax(logits[0].double() / temperature, -1)
    if ((odds / odds.max() - min_p).abs() < 1e-5).any():
        return  # rounding may put it on either side
    kept = MinPLogitsWarper(min_p)(torch.zeros(1, 1), logits / temperature)[0].isfinite()
    count = 400
    table = SamplingTable(1, 30)
    table.set(0, SamplingParams(temperature=temperature, min_p=min_p), seed)
    rows = table.rows(torch.zeros(count, dtype=torch.int64).numpy(), CPU)
    drawn = sample(logits.expand(count, -1).clone(), rows, torch.arange(count))[0]
    assert kept[drawn].all()
    share = odds.where(kept, 0.0) / odds[kept].sum()
    often = (share * count > 20).nonzero().flatten()
    assert set(often.tolist()) <= set(drawn.tolist())


def test_logprobs_are_those_of_the_model_whatever_was_asked_for() -> None:
    """Of rows of one batch with different counts, through chunks, evictions and penalties."""
    rng, model = random.Random(5), TinyCausalLM()
    core = make_core(model, saves=True)
    requests = [random_request(number, rng) for number in range(16)]
    for number, request in enumerate(requests):
        count = None if number % 4 == 3 else number % 4 * 3
        request.sampling = replace(request.sampling, logprobs=count)
        core.add(request)
    told: dict[int, list[TokenLogprobs]] = {request.request_id: [] for request in requests}
    while core.has_work:
        if rng.random() < 0.2:
            core.set_limits(rng.choice([1, 8]), 24, "preempt")
        for request_id, found in core.step().logprobs.items():
            told[request_id].append(found)
    assert core.load().preemptions
    for number, request in enumerate(requests):
        found = told[request.request_id]
        assert len(found) == (0 if number % 4 == 3 else len(request.output_ids))
        for place, one in enumerate(found):
            known = [*request.prompt_ids, *request.output_ids[:place]]
            expected = torch.log_softmax(model.logits_of(known), -1)
            assert one.logprob == pytest.approx(float(expected[request.output_ids[place]]), abs=1e-3)
            best = expected.topk(number % 4 * 3)
            assert one.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-3)
            if len(best.values) and float(best.values[:-1].sub(best.values[1:]).amin()) > 1e-3:
                assert one.top_ids == best.indices.tolist()


def make_core(model: TinyCausalLM, saves: bool) -> EngineCore:
    """Blocks for a few requests only."""
    pools = [KvPool(count, 4, model.spec.layers, torch.float32, CPU) for count in (60, 60)]
    executor = TorchExecutor(model, *pools, max_slots=8, max_step_tokens=24, max_model_len=CONTEXT)
    costs = SwapCosts(0.0, 0.0, 1.0) if saves else SwapCosts(1.0, 1.0, 0.0)
    core = EngineCore(executor, clock=VirtualClock(), limits=Limits(8, 24), swap_costs=costs)
    for _ in range(20):
        core.scheduler.output_lengths.observe(1)
    return core


def random_request(number: int, rng: random.Random) -> Request:
    choose = rng.choice
    params = SamplingParams(
        temperature=choose([0.0, 0.0, 1.0]),
        min_p=choose([0.0, 0.05, 0.3]),
        top_k=choose([0, 0, 20]),
        max_tokens=30,
        min_tokens=choose([0, 10, 30]),
        repetition_penalty=choose([1.0, 1.5, 0.8]),
        presence_penalty=choose([0.0, 1.0]),
        frequency_penalty=choose([0.0, 0.5]),
        logit_bias=choose([{}, {END: 6.0, 3: -100.0}]),
    )
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
    return Request(number, prompt, params, 30, frozenset({END}), seed=rng.getrandbits(64))


def run(core: EngineCore, rng: random.Random, until: int | None = None) -> None:
    """To the end, or until so many tokens came in all."""
    tokens = 0
    for step in range(5000):
        if not core.has_work or (until is not None and tokens >= until):
            return
        if step % 15 == 7:
            core.set_limits(1, 24, "preempt")
        elif step % 15 == 10:
            core.set_limits(8, rng.randint(8, 24), "preempt")
        tokens += len(core.step().requests)
    raise AssertionError("requests never finish")


@pytest.mark.parametrize("seed", range(4))
def test_the_engine_chooses_the_tokens_of_a_plain_loop(seed: int) -> None:
    """Half of the requests move to another engine on their way, with the tokens they have."""
    rng, model = random.Random(seed), TinyCausalLM()
    first, second = make_core(model, saves=True), make_core(model, saves=False)
    requests = [random_request(number, rng) for number in range(24)]
    for request in requests:
        first.add(request)
    run(first, rng, until=300)
    moved = {}
    for request in requests[::2]:
        if request.finish_reason is None:
            first.abort(request.request_id)
            moved[request.request_id] = resumed(request)
            second.add(moved[request.request_id])
    run(first, rng)
    run(second, rng)
    assert first.load().preemptions and len(moved) > 4
    differing = 0
    for request in requests:
        output = list(request.output_ids)
        if (later := moved.get(request.request_id)) is not None:
            output += later.output_ids
            assert later.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        differing += check_tokens(model, request, output)
    assert differing <= 2


def resumed(request: Request) -> Request:
    """As a gateway sends it to the next engine."""
    done = len(request.output_ids)
    left = replace(
        request.sampling,
        max_tokens=30 - done,
        min_tokens=max(0, request.sampling.min_tokens - done),
    )
    tokens = [*request.prompt_ids, *request.output_ids]
    return Request(
        request.request_id,
        tokens,
        left,
        30 - done,
        request.stop_ids,
        seed=request.seed,
        num_prior_outputs=done,
    )


def check_tokens(model: TinyCausalLM, request: Request, output: list[int]) -> int:
    """The tokens, one by one, are those chosen from the logits of the whole sequence so far, near ties
    excepted; how many of these there were."""
    assert output and (len(output) == 30 or output[-1] == END)
    assert END not in output[: max(0, request.sampling.min_tokens)][:-1]
    table, near_ties = SamplingTable(1, VOCAB), 0
    table.set(0, request.sampling, request.seed)
    rows = table.rows(torch.zeros(1, dtype=torch.int64).numpy(), CPU)
    for count, token in enumerate(output):
        known = [*request.prompt_ids, *output[:count]]
        logits = adjusted(model.logits_of(known), request, output[:count])
        expected = int(sample(logits[None].clone(), rows, torch.tensor([len(known)]))[0])
        if token != expected:
            assert request.sampling.temperature or float(logits[expected] - logits[token]) < NEAR_TIE
            near_ties += 1
    return near_ties


def test_memory_for_penalties_is_what_they_allocate() -> None:
    """With all slots at the longest context."""
    slots, longest = 3, 40
    table = AdjustmentTable(slots, longest, CPU)
    tokens = np.arange(longest - 1)
    for slot in range(slots):
        table.set(slot, Request(slot, tokens.tolist(), SamplingParams(presence_penalty=0.5), 1), tokens)
    found = table.rows(np.arange(slots), slots)
    assert found is not None and found.history is not None and found.penalties is not None
    assert found.history.nbytes == penalty_bytes(slots, longest, Kernels.TORCH)
    of = found.penalties
    launch = penalties.penalise_launch(
        torch.zeros(slots, 50),
        found.history,
        torch.full((slots,), longest),
        of.rows,
        of.slots,
        of.output_from,
        of.repetition,
        of.frequency,
        of.presence,
    )
    taken = found.history.nbytes + launch.arguments["room"].nbytes
    assert taken == penalty_bytes(slots, longest, Kernels.TRITON)
