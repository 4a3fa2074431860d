"""Does the engine choose the tokens that the model's own eager attention would?"""

from __future__ import annotations

from typing import Any

import torch

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.loader import CausalLM
from chiron_engine.model.self_check import TOLERANCE, run_paged
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY
from chiron_engine.runtime.torch_executor import TorchExecutor
from scripts.family_sweep.tiny_configs import CONTEXT, FIRST_PLAIN_TOKEN

NEAR_TIE = 1e-3
_LENGTHS = (41, 23, 9, 2)
_SHARED_PREFIX = 24
_OUTPUTS = 12
_BLOCK_SIZE = 4
_BLOCKS = 96
_SLOTS = 4
_STEP_TOKENS = 13
# Sums in float32 depend on the number of rows; beyond this share of near ties tokens prove little.
_MOST_NEAR_TIES = 0.1


def difference(model: CausalLM, eager: Any) -> str | None:
    """What of `model`, run by the engine, is unlike `eager`: in words, or None where it is exact.

    Greedy tokens of several prompts, prefilled in chunks beside decodes, one of them with a cached
    prefix; then the logits of every position, relative to the largest.
    """
    prompts = _prompts(model.spec.vocab_size)
    return _token_difference(model, eager, prompts) or _logit_difference(model, eager, prompts)


def _prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    drawn = [
        torch.randint(FIRST_PLAIN_TOKEN, vocab_size, (length,), generator=generator).tolist()
        for length in _LENGTHS
    ]
    return [*drawn, drawn[0][:_SHARED_PREFIX] + drawn[1]]


def _token_difference(model: CausalLM, eager: Any, prompts: list[list[int]]) -> str | None:
    near_ties = 0
    for prompt, output in zip(prompts, _generate(model, prompts), strict=True):
        logits = _eager_logits(eager, prompt + output)[len(prompt) - 1 : -1]
        best = logits.topk(2).values
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        shortfall = best[:, 0] - chosen
        wrong = (shortfall > NEAR_TIE).nonzero().flatten().tolist()
        if wrong:
            at = wrong[0]
            return (
                f"token {at + 1} after a prompt of {len(prompt)} is {output[at]}, not "
                f"{int(logits[at].argmax())}, which eager attention prefers by {float(shortfall[at]):.1e}"
            )
        near_ties += int((best[:, 0] - best[:, 1] <= NEAR_TIE).sum())
    if near_ties > _MOST_NEAR_TIES * len(prompts) * _OUTPUTS:
        return f"{near_ties} of {len(prompts) * _OUTPUTS} tokens are near ties: the tiny model proves nothing"
    return None


def _generate(model: CausalLM, prompts: list[list[int]]) -> list[list[int]]:
    pool = KvPool(_BLOCKS, _BLOCK_SIZE, model.spec.layers, torch.float32)
    # Whatever is read before it was written shows.
    pool.storage.view(torch.float32).fill_(torch.nan)
    executor = TorchExecutor(
        model, pool, None, max_slots=_SLOTS, max_step_tokens=_STEP_TOKENS, max_model_len=CONTEXT
    )
    core = EngineCore(executor, clock=VirtualClock(), limits=Limits(_SLOTS, _STEP_TOKENS))
    requests = [
        Request(request_id=number, prompt_ids=prompt, sampling=GREEDY, max_tokens=_OUTPUTS)
        for number, prompt in enumerate(prompts)
    ]
    for request in requests:
        core.add(request)
    while core.has_work:
        core.step()
    core.close()
    return [list(request.output_ids) for request in requests]


def _logit_difference(model: CausalLM, eager: Any, prompts: list[list[int]]) -> str | None:
    tensors = [torch.tensor(prompt) for prompt in prompts]
    with torch.inference_mode():
        paged = run_paged(model, tensors, torch.Generator().manual_seed(6), model.spec.layers)
    expected = [_eager_logits(eager, prompt) for prompt in prompts]
    apart = max(float((a - b).abs().max()) for a, b in zip(paged, expected, strict=True))
    error = apart / max(float(logits.abs().max()) for logits in expected)
    if error <= TOLERANCE:
        return None
    return f"logits differ by {error:.1e} (relative), more than {TOLERANCE:.0e}"


def _eager_logits(eager: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = eager(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    return logits
