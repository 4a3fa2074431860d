"""How likely the model had the tokens of prompts, against whole passes over them: through small chunks,
batch-mates, prefixes in the cache, evictions and a second engine."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import StepHandle
from chiron_engine.core.requests import InvalidRequest, build_request
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.plan import StepPlan, TokenLogprobs
from chiron_engine.policy.iteration.prefills import SCORED_TOKENS
from chiron_engine.policy.iteration.request import Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.runtime.torch_executor import TorchExecutor
from tests.runtime.tiny_causal_lm import CONTEXT, VOCAB, TinyCausalLM

Told = dict[int, list[TokenLogprobs]]


def make_core(
    model: TinyCausalLM, *, blocks: int = 200, saves: bool = True, step_tokens: int = 24
) -> EngineCore:
    pools = [
        KvPool(count, 4, model.spec.layers, torch.float32, torch.device("cpu")) for count in (blocks, blocks)
    ]
    executor = TorchExecutor(model, *pools, max_slots=8, max_step_tokens=step_tokens, max_model_len=CONTEXT)
    costs = SwapCosts(0.0, 0.0, 1.0) if saves else SwapCosts(1.0, 1.0, 0.0)
    return EngineCore(executor, clock=VirtualClock(), limits=Limits(8, step_tokens), swap_costs=costs)


def asking(number: int, prompt: list[int], count: int | None, max_tokens: int = 6) -> Request:
    params = SamplingParams(temperature=0.0, prompt_logprobs=count, max_tokens=max_tokens)
    return Request(number, prompt, params, max_tokens)


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


def check(model: TinyCausalLM, prompt: list[int], count: int, found: list[TokenLogprobs]) -> None:
    assert len(found) == len(prompt) - 1
    for place, one in enumerate(found, 1):
        expected = torch.log_softmax(model.logits_of(prompt[:place]), -1)
        of_token = expected[prompt[place]]
        assert one.logprob == pytest.approx(float(of_token), abs=1e-3)
        best = expected.topk(count)
        assert one.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-3)
        assert len(one.top_ids) == count
        assert one.rank is not None
        assert (
            int((expected > of_token + 1e-3).sum()) < one.rank <= 1 + int((expected > of_token - 1e-3).sum())
        )


def run(core: EngineCore, told: Told, rng: random.Random | None = None) -> None:
    """To the end, with evictions where there is a generator."""
    for _ in range(3000):
        if not core.has_work:
            return
        if rng is not None:
            core.set_limits(rng.choice([1, 3, 8]), rng.randint(8, 24), "preempt")
        output = core.step()
        for request_id, found in output.prompt_logprobs.items():
            assert request_id not in told, "told twice"
            told[request_id] = found
    raise AssertionError("requests never finish")


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_they_are_those_of_whole_passes(seed: int, saves: bool) -> None:
    """Prompts begin alike, so that the cache has what they need; half of the requests ask."""
    rng, model = random.Random(seed), TinyCausalLM()
    core, shared, told = make_core(model, blocks=70, saves=saves), random_prompt(rng, 30), {}
    requests = [
        asking(
            number,
            shared[: rng.choice([0, 1, 30])] + random_prompt(rng, rng.randint(1, 60)),
            rng.choice([0, 1, 5, 20]) if number % 2 else None,
        )
        for number in range(14)
    ]
    for request in requests:
        request.slo = Slo(SloClass.BATCH)  # those give way when limits shrink
        core.add(request)
    run(core, told, rng)
    assert core.load().preemptions
    for request in requests:
        asked, prompt = request.sampling.prompt_logprobs, list(request.prompt_ids)
        assert len(request.output_ids) == 6
        if asked is None or len(prompt) == 1:
            assert request.request_id not in told
        else:
            check(model, prompt, asked, told[request.request_id])
    core.close()


def test_a_prefix_in_the_cache_is_computed_again_for_those_who_ask() -> None:
    model, prompt, told = TinyCausalLM(), random_prompt(random.Random(1), 40), {}
    core = make_core(model)
    for number, count in enumerate((None, 2, None)):
        request = asking(number, prompt, count)
        core.add(request)
        run(core, told)
        assert request.num_cached_tokens == (36 if number == 2 else 0)
    check(model, prompt, 2, told[1])


def test_steps_compute_few_tokens_of_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on beside them."""
    model, rng = TinyCausalLM(), random.Random(2)
    core, told = make_core(model, step_tokens=CONTEXT), {}
    requests = [asking(number, random_prompt(rng, 100), 1 if number < 3 else None) for number in range(4)]
    for request in requests:
        core.add(request)
    chunks: list[list[int]] = []
    submit = core._executor.submit

    def watched(plan: StepPlan) -> StepHandle:
        chunks.append([chunk.score_to - chunk.score_from for chunk in plan.chunks])
        return submit(plan)

    monkeypatch.setattr(core._executor, "submit", watched)
    run(core, told)
    assert sum(map(sum, chunks)) == 3 * 99
    assert SCORED_TOKENS - 3 < max(map(sum, chunks)) <= SCORED_TOKENS
    assert len(chunks[0]) == 3, "the third waits, the fourth need not"
    for request in requests[:3]:
        check(model, list(request.prompt_ids), 1, told[request.request_id])


def test_an_evicted_request_goes_on_where_it_was_and_elsewhere() -> None:
    """Handed back within its prompt: told once by the engine that comes to its end."""
    model, rng = TinyCausalLM(), random.Random(3)
    first, second, told = make_core(model), make_core(model), {}
    first.hand_back_evicted = True
    requests = [asking(number, random_prompt(rng, 60), 3) for number in range(3)]
    for request in requests:
        request.slo = Slo(SloClass.BATCH)
        first.add(request)
    for _ in range(4):
        told.update(first.step().prompt_logprobs)
    first.set_limits(1, 24, "preempt")
    (evicted,) = first.step().handed_back
    assert 0 < evicted.num_scored < 59 and evicted.host_blocks and not evicted.output_ids
    first.set_limits(8, 24)
    first.add(evicted)
    run(first, told)
    elsewhere: Told = {}
    second.add(asking(evicted.request_id, list(evicted.prompt_ids), 3))
    run(second, elsewhere)
    for request in requests:
        check(model, list(request.prompt_ids), 3, told[request.request_id])
    check(model, list(evicted.prompt_ids), 3, elsewhere[evicted.request_id])


def test_output_of_other_engines_is_no_prompt() -> None:
    model, told = TinyCausalLM(), {}
    core, prompt = make_core(model), random_prompt(random.Random(4), 20)
    request = replace(asking(0, [*prompt, 5, 6, 7], 1), num_prior_outputs=3)
    core.add(request)
    run(core, told)
    check(model, prompt, 1, told[0])


@pytest.mark.parametrize("value", [-1, 21, 1.5, "5", True])
def test_what_cannot_be_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match="prompt_logprobs is"):
        SamplingParams(prompt_logprobs=value)  # type: ignore[arg-type]


def test_more_than_a_message_holds_is_refused() -> None:
    core = make_core(TinyCausalLM())
    shape = replace(core.shape, max_model_len=1 << 18, num_device_blocks=1 << 18)
    params = SamplingParams(prompt_logprobs=20)
    with pytest.raises(InvalidRequest, match="prompt_logprobs is 20 and the prompt has 20000 tokens"):
        build_request(1, [1] * 20000, params, shape=shape, eos_token_ids=(), draw_seed=lambda: 1, arrival=0.0)
    with pytest.raises(InvalidRequest, match="this engine computes no model"):
        shape = replace(shape, has_logits=False)
        build_request(1, [1, 2], params, shape=shape, eos_token_ids=(), draw_seed=lambda: 1, arrival=0.0)
