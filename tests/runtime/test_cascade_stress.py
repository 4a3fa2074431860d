"""Prefixes that requests share while these are evicted, restored, recomputed and aborted, on Triton's
kernels, interpreted where there is no GPU: after each token others are as likely as the whole sequence,
computed at once, makes them."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from tiny_causal_lm import VOCAB, TinyCausalLM

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.model.attention import AttentionBatch
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.plan import TokenLogprobs
from chiron_engine.policy.iteration.request import FinishReason, Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.runtime.shared_prefixes import PrefixFinder, cascade_rule
from chiron_engine.runtime.torch_executor import TorchExecutor
from tests.triton_interpreter import install

BLOCK, SLOTS, STEP_TOKENS = 16, 6, 48
SAVE, RECOMPUTE = SwapCosts(0.0, 0.0, 1.0), SwapCosts(1.0, 1.0, 0.0)
CLOSE = 1e-4
# Hot, as the model's choice is the last token again, which is sure whatever attention finds. How likely the
# others are is not.
DRAWN = SamplingParams(temperature=20.0, logprobs=4)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Recorder:
    """A model, and the groups of every pass: their members and the tokens of their prefix."""

    def __init__(self, model: TinyCausalLM) -> None:
        self.model = model
        self.spec, self.precision, self.kernels = model.spec, model.precision, model.kernels
        self.groups: list[list[tuple[int, int]]] = []

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, *rest
    ) -> torch.Tensor:
        shared = batch.cascade
        if batch.num_decodes:
            members = [] if shared is None else shared.starts.diff().tolist()
            lens = [] if shared is None else shared.lens.tolist()
            self.groups.append(list(zip(members, lens, strict=True)))
        if shared is not None:
            assert (shared.skipped < batch.decode_lens).all()
        return self.model.forward(ids, positions, batch, *rest)


def make_core(model: Recorder, costs: SwapCosts, blocks: int) -> EngineCore:
    """A pool too small for all slots."""
    pools = [
        KvPool(blocks, BLOCK, model.spec.layers, torch.float32, DEVICE),
        KvPool(24, BLOCK, model.spec.layers, torch.float32, pinned=DEVICE.type == "cuda"),
    ]
    executor = TorchExecutor(
        model,
        *pools,
        max_slots=SLOTS,
        max_step_tokens=STEP_TOKENS,
        max_model_len=256,
        prefixes=PrefixFinder(cascade_rule(512, BLOCK), BLOCK),
    )
    core = EngineCore(executor, clock=VirtualClock(), limits=Limits(SLOTS, STEP_TOKENS), swap_costs=costs)
    for _ in range(20):  # outputs predicted far too short: blocks run out and requests are evicted
        core.scheduler.output_lengths.observe(1)
    return core


def make_requests(rng: random.Random) -> list[Request]:
    """Prompts with one of two starts, of which the second goes on in two ways, or with none."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(count)]

    one, two = tokens(3 * BLOCK), tokens(BLOCK)
    starts = [one, one, two, two + one, two + one, tokens(7)]
    return [
        Request(
            request_id=number,
            prompt_ids=starts[number % len(starts)] + tokens(rng.randint(1, 20)),
            sampling=DRAWN,
            seed=number,
            max_tokens=rng.randint(4, 22),
            slo=Slo(rng.choice([SloClass.BATCH, SloClass.BATCH, SloClass.INTERACTIVE])),
            arrival=float(number),
        )
        for number in range(14)
    ]


def run(core: EngineCore, requests: list[Request], rng: random.Random) -> dict[int, list[TokenLogprobs]]:
    """Arrivals in bursts, limits that shrink and grow again, and an abort. What was likely for each token, by
    request."""
    waiting = requests[::-1]
    found: dict[int, list[TokenLogprobs]] = {request.request_id: [] for request in requests}
    for step in range(400):
        if not (waiting or core.has_work):
            return found
        for _ in range(rng.randint(0, 4)):
            if waiting:
                core.add(waiting.pop())
        if step % 12 == 8:
            core.set_limits(2, STEP_TOKENS, "preempt")
        elif step % 12 == 10:
            core.set_limits(SLOTS, STEP_TOKENS)
        for number, of_token in core.step().logprobs.items():
            found[number].append(of_token)
        if step == 15:
            core.abort(requests[1].request_id)
    raise AssertionError("requests never finish")


@pytest.mark.parametrize("costs", [SAVE, RECOMPUTE])
def test_tokens_are_as_likely_as_by_the_whole_sequence(costs: SwapCosts) -> None:
    if DEVICE.type == "cpu":
        install()
    rng = random.Random(7)
    model = Recorder(TinyCausalLM(device=str(DEVICE), kernels=Kernels.TRITON))
    core = make_core(model, costs, blocks=26)
    requests = make_requests(rng)
    found = run(core, requests, rng)

    load = core.load()
    assert load.preemptions >= 3 and load.prefix_hit_tokens > 0
    assert load.free_blocks == load.total_blocks
    for request in requests:
        check_tokens(model.model, request, found[request.request_id])
    assert [] in model.groups and any(len(of_step) == 2 for of_step in model.groups)
    members = [sum(count for count, _ in of_step) for of_step in model.groups]
    assert any(after < before for before, after in pairwise(members))
    assert any(after > before for before, after in pairwise(members))
    assert {tokens for of_step in model.groups for _, tokens in of_step} >= {BLOCK, 3 * BLOCK}


def check_tokens(model: TinyCausalLM, request: Request, likely: list[TokenLogprobs]) -> None:
    known, output = list(request.prompt_ids), list(request.output_ids)
    if request.finish_reason is not FinishReason.ABORT:
        assert request.finish_reason is FinishReason.LENGTH and len(output) == request.max_tokens
    for token, of_token in zip(output, likely, strict=True):
        exact = model.logits_of(known).log_softmax(dim=0)
        found = torch.tensor([of_token.logprob, *of_token.top_logprobs], device=exact.device)
        torch.testing.assert_close(found, exact[[token, *of_token.top_ids]], rtol=1e-5, atol=CLOSE)
        known.append(token)
