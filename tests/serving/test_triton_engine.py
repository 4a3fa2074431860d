"""The whole engine on Triton's kernels, interpreted: token for token what torch alone gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chiron_engine import LLM, SamplingParams
from chiron_engine.model.kv_scales import KvScales
from chiron_engine.model.precision import BFLOAT16
from tests.cli.tiny_llama import write_tiny_llama
from tests.model.quantised_attention import add_tensors, reference, shortfall, write_scales
from tests.triton_interpreter import install

PROMPTS = ["a prompt of several chunks, longer than a step takes", "short", "one more, of middling length"]
SAMPLING = [
    SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1.1, top_k=20, top_p=0.9, min_p=0.01, seed=3, max_tokens=9, ignore_eos=True),
    SamplingParams(
        temperature=0.0,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=0.1,
        logit_bias={5: 1.5},
        min_tokens=4,
        max_tokens=6,
    ),
]
SMALL = {"dtype": "float32", "device": "cpu", "threads": 1, "kv_cache_memory": 1 << 18, "swap_space": 1 << 17}


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the engine on the GPU")
@pytest.mark.parametrize("block_size", [16, 64])
def test_tokens_are_those_of_torch(block_size: int, tmp_path: Path) -> None:
    install()
    model = str(write_tiny_llama(tmp_path / "tiny"))
    found = {}
    for kernels in ("torch", "triton"):
        log = tmp_path / f"{kernels}.jsonl"
        with LLM(
            model,
            kernels=kernels,
            block_size=block_size,
            max_num_seqs=3,
            max_num_batched_tokens=16,
            step_log=str(log),
            **SMALL,
        ) as llm:
            outputs = llm.generate(PROMPTS, SAMPLING)
        found[kernels] = [(output.token_ids, output.finish_reason) for output in outputs]
        steps = [json.loads(line) for line in log.read_text().splitlines()]
        assert any(step["prefill_tokens"] and step["decode_requests"] for step in steps)
    assert found["triton"] == found["torch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the engine on the GPU")
def test_tokens_over_kv_of_8_bits_are_those_of_torch(tmp_path: Path) -> None:
    """Near enough to the best by the same model in torch; with scales that most of its keys need."""
    install()
    path, scales = (
        write_tiny_llama(tmp_path / "tiny"),
        {0: KvScales(1 / 2000, 1 / 4000), 1: KvScales(1 / 2000, 1 / 1000)},
    )
    write_scales(path, scales)
    weights = load_file(path / "model.safetensors")
    # Flatter attention: with the model's own, the last bit of a key decides between tokens.
    add_tensors(path, {name: weight / 16 for name, weight in weights.items() if "q_proj" in name})
    options = SMALL | {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "kernels": "triton"}
    greedy = SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True)
    with LLM(str(path), max_num_seqs=3, max_num_batched_tokens=16, **options) as llm:
        outputs = llm.generate(PROMPTS, greedy)
    right, unscaled = (reference(path, BFLOAT16, each) for each in (scales, {}))
    texts = [(output.prompt_token_ids, output.token_ids) for output in outputs]
    assert all(shortfall(right, prompt, tokens) < 0.03 for prompt, tokens in texts)
    assert any(shortfall(unscaled, prompt, tokens) > 0.1 for prompt, tokens in texts)
