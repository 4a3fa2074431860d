"""The whole engine on Triton's kernels, interpreted: token for token what torch alone gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chiron_engine import LLM, SamplingParams
from tests.cli.tiny_llama import write_tiny_llama
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
