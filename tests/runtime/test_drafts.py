"""Tokens with guesses are those without, drawn or greedy, whatever the scheduler does to a request."""

from __future__ import annotations

import random

import pytest
import torch

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.policy.iteration.autoscaler_inputs import EngineCapacity
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.request import FinishReason, Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import GREEDY, SamplingParams
from chiron_engine.policy.iteration.speculation import Speculation
from chiron_engine.runtime.torch_executor import TorchExecutor
from tests.runtime.tiny_causal_lm import CONTEXT, TinyCausalLM

BLOCK, SLOTS, BUDGET = 4, 6, 40
OUTPUT = 50
SAMPLINGS = [
    GREEDY,
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=0.7, top_p=0.8, top_k=20),
    SamplingParams(temperature=0.0, min_tokens=20, logit_bias={3: 1.0, 9: -2.0}),
    SamplingParams(temperature=0.4, repetition_penalty=1.2),
]


def make_core(guesses: int, blocks: int) -> EngineCore:
    model = TinyCausalLM()
    cpu = torch.device("cpu")
    pools = [KvPool(count, BLOCK, model.spec.layers, torch.float32, cpu) for count in (blocks, 60)]
    executor = TorchExecutor(model, *pools, max_slots=SLOTS, max_step_tokens=BUDGET, max_model_len=CONTEXT)
    clock = VirtualClock()
    core = EngineCore(
        executor,
        clock=clock,
        limits=Limits(SLOTS, BUDGET),
        swap_costs=SwapCosts(0.0, 0.0, 1.0),
        speculation=Speculation(guesses, EngineCapacity(SLOTS, BUDGET, BLOCK, blocks * BLOCK))
        if guesses
        else None,
    )
    for _ in range(20):  # outputs predicted far too short: blocks run out and requests are evicted
        core.scheduler.output_lengths.observe(1)
    return core


def make_requests(seed: int) -> list[Request]:
    """Prompts of few tokens, so that pairs repeat; some share their beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(5) for _ in range(12)]
    requests = []
    for number in range(12):
        prompt = (shared if number % 3 else []) + [rng.randrange(5) for _ in range(rng.randrange(2, 30))]
        slo = Slo(SloClass.BATCH if number % 2 else SloClass.INTERACTIVE)
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        stops = frozenset({17, 60}) if number % 4 == 0 else frozenset()
        requests.append(Request(number, prompt, sampling, OUTPUT, slo=slo, seed=number, stop_ids=stops))
    return requests


def serve(core: EngineCore, requests: list[Request], seed: int, aborted: frozenset[int]) -> None:
    """Requests come and the limits move at random; some are aborted on the way."""
    rng = random.Random(seed)
    waiting = list(requests)
    clock = core.clock
    assert isinstance(clock, VirtualClock)
    while waiting or core.has_work:
        clock.sleep(0.01)
        if waiting and rng.random() < 0.3:
            core.add(waiting.pop(0))
        if rng.random() < 0.1:
            running = rng.randrange(1, SLOTS + 1)
            core.set_limits(running, rng.randrange(running, BUDGET + 1), rng.choice(["drain", "preempt"]))
        for request in requests:
            if request.request_id in aborted and len(request.output_ids) > 10:
                core.abort(request.request_id)
        core.step()


@pytest.fixture(scope="module")
def alone() -> dict[int, list[int]]:
    """The output of every request, by itself and one token a step."""
    outputs = {}
    for seed in range(3):
        for request in make_requests(seed):
            core = make_core(0, 200)
            core.add(request)
            while core.has_work:
                core.step()
            outputs[100 * seed + request.request_id] = list(request.output_ids)
    return outputs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("guesses", [2, 7])
@pytest.mark.parametrize("blocks", [48, 200])
def test_outputs_are_those_of_decoding_one_by_one(
    alone: dict[int, list[int]], seed: int, guesses: int, blocks: int
) -> None:
    core = make_core(guesses, blocks)
    requests = make_requests(seed)
    aborted = frozenset({5, 8})
    serve(core, requests, seed, aborted)
    load = core.load()
    assert load.accepted_tokens > 50
    assert blocks > 100 or load.preemptions > 0
    assert load.free_blocks == load.total_blocks
    for request in requests:
        expected = alone[100 * seed + request.request_id]
        if request.finish_reason is FinishReason.ABORT:
            expected = expected[: len(request.output_ids)]
        assert list(request.output_ids) == expected


def test_what_an_engine_began_another_goes_on_with(alone: dict[int, list[int]]) -> None:
    for number in (0, 1, 2):
        begun = make_requests(0)[number]
        expected = alone[number]
        core = make_core(7, 200)
        prompt = [*begun.prompt_ids, *expected[:9]]
        request = Request(
            number, prompt, begun.sampling, OUTPUT - 9, stop_ids=begun.stop_ids, seed=number,
            num_prior_outputs=9,
        )  # fmt: skip
        serve(core, [request], 0, frozenset())
        assert list(request.output_ids) == expected[9:]
