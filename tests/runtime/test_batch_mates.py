"""The same request alone and among 63 others, through the whole engine on SmolLM2.

In int8 its tokens are the same, whatever its batch-mates and however its prompt is cut. In float32 the
matrix products depend on the number of rows: tokens may differ from a position on where the two best
logits lie within 1e-3, and such positions are rare.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from chiron_engine.model.cpu_kernels import why_not_int8
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.runtime.build import resolve_device
from chiron_engine.serving.llm import LLM
from chiron_engine.serving.outputs import RequestOutput

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"
TOKENS = 16
NEAR_TIE = 1e-3
REPEATED = 12


def requests() -> tuple[list[str], list[SamplingParams]]:
    """64 prompts; every other one is sampled with a seed."""
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    params = [
        dataclasses.replace(greedy, temperature=0.8, top_p=0.95, seed=number) if number % 2 else greedy
        for number in range(len(prompts))
    ]
    assert len(prompts) == 64
    return prompts, params


def together_and_alone(
    dtype: str, prompts: list[str], params: list[SamplingParams]
) -> list[tuple[RequestOutput, RequestOutput]]:
    """Some of the requests among all of them, and then by themselves in other chunks."""
    options = {"dtype": dtype, "max_num_seqs": 64, "max_model_len": 2048, "swap_space": 0}
    options |= {"enable_prefix_caching": False, "kv_cache_memory": 2 << 30}
    with LLM("smollm2", max_num_batched_tokens=320, **options) as llm:
        together = llm.generate(prompts, params)
    chosen = list(range(0, 64, 64 // REPEATED))
    with LLM("smollm2", max_num_batched_tokens=48, **options | {"max_num_seqs": 1}) as llm:
        return [(together[n], llm.generate(prompts[n], params[n])[0]) for n in chosen]


def test_int8_tokens_do_not_depend_on_batch_mates() -> None:
    if (reason := why_not_int8(resolve_device("cpu"))) is not None:
        pytest.skip(reason)
    for among, alone in together_and_alone("int8", *requests()):
        assert among.token_ids == alone.token_ids and len(alone.token_ids) == TOKENS


def test_float32_tokens_depend_on_them_only_at_near_ties() -> None:
    prompts, params = requests()
    greedy = [dataclasses.replace(p, temperature=0.0, top_p=1.0, seed=None, logprobs=2) for p in params]
    positions = near_ties = 0
    for among, alone in together_and_alone("float32", prompts, greedy):
        assert alone.logprobs is not None
        for position, (one, other) in enumerate(zip(among.token_ids, alone.token_ids, strict=True)):
            positions += 1
            if one == other:
                continue
            best, second = alone.logprobs[position].top_logprobs[:2]
            assert best - second < NEAR_TIE, (alone.prompt_token_ids[:8], position)
            near_ties += 1
            break
    assert positions > 150 and near_ties <= positions / 100
