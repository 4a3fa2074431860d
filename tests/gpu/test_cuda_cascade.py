"""Prefixes that decoding requests share, read once on a CUDA device with two steps under way."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_causal_lm import VOCAB, TinyCausalLM

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.model.attention import AttentionBatch
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.triton_attention import TritonAttention
from chiron_engine.policy.iteration.plan import TokenLogprobs
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.runtime.shared_prefixes import PrefixFinder, cascade_rule
from chiron_engine.runtime.torch_executor import TorchExecutor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLOSE = 1e-3
# Hot, as the model's choice is the last token again, which is sure whatever attention finds. How likely the
# others are is not.
DRAWN = SamplingParams(temperature=20.0, logprobs=4)


@pytest.mark.parametrize("block", [16, 64])
def test_tokens_are_as_likely_as_by_the_whole_sequence(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    members: list[int] = []
    begin = TritonAttention.begin

    def recorded(self: TritonAttention, batch: AttentionBatch, pool: KvPool) -> None:
        members.append(0 if batch.cascade is None else len(batch.cascade.members))
        begin(self, batch, pool)

    monkeypatch.setattr(TritonAttention, "begin", recorded)
    model = TinyCausalLM(device="cuda", kernels=Kernels.TRITON)
    pools = [
        KvPool(640 // block, block, model.spec.layers, torch.float32, "cuda"),
        KvPool(256 // block, block, model.spec.layers, torch.float32, "cpu", pinned=True),
    ]
    finder = PrefixFinder(cascade_rule(512, block), block)
    core = EngineCore(
        TorchExecutor(model, *pools, max_slots=8, max_step_tokens=256, max_model_len=256, prefixes=finder)
    )
    draw = random.Random(block)
    prefix = [draw.randrange(VOCAB) for _ in range(128)]
    requests = [
        Request(number, prefix + [draw.randrange(VOCAB) for _ in range(3 + number)], DRAWN, 12 + number)
        for number in range(9)
    ]
    # The first leaves the prefix in the cache, without which no two would have the same blocks.
    likely: dict[int, list[TokenLogprobs]] = {request.request_id: [] for request in requests}
    for arriving in (requests[:1], requests[1:]):
        for request in arriving:
            core.add(request)
        while core.has_work:
            for request_id, of_token in core.step().logprobs.items():
                likely[request_id].append(of_token)
    core.close()
    assert max(members) >= 2 and 0 in members
    for request in requests:
        known = list(request.prompt_ids)
        assert len(request.output_ids) == request.max_tokens
        for token, of_token in zip(request.output_ids, likely[request.request_id], strict=True):
            exact = model.logits_of(known).log_softmax(dim=0)
            found = torch.tensor([of_token.logprob, *of_token.top_logprobs], device=exact.device)
            torch.testing.assert_close(found, exact[[token, *of_token.top_ids]], rtol=1e-5, atol=CLOSE)
            known.append(token)
