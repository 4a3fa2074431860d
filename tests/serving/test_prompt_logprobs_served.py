"""How likely a model had the tokens of prompts, by `LLM`: native decoder and Hugging Face class."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from chiron_engine import LLM, SamplingParams
from tests.model.tiny_config import TINY

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 4, "max_model_len": 128, "swap_space": 0}


@pytest.mark.parametrize(("kind", "more"), [("LlamaConfig", {}), ("GPTNeoXConfig", {"hidden_act": "gelu"})])
@pytest.mark.parametrize("step_tokens", [16, 512])
def test_they_equal_a_whole_pass(
    kind: str, more: dict[str, Any], step_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHIRON_CACHE", str(tmp_path / "cache"))
    reference, path = saved(kind, more, tmp_path / "model")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 96, (size,), generator=generator).tolist() for size in (2, 40, 90, 1, 90)]
    prompts[4][:60] = prompts[2][:60]
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=4)
    with LLM(str(path), max_num_batched_tokens=step_tokens, **OPTIONS) as llm:
        outputs = llm.generate(prompts, params)
        (plain,) = llm.generate([prompts[1]], SamplingParams(max_tokens=1))
        streamed = asyncio.run(last_output(llm, prompts[1], params))
    assert plain.prompt_logprobs is None
    assert streamed.prompt_logprobs is not None and outputs[1].prompt_logprobs is not None
    assert [one.top_ids for one in streamed.prompt_logprobs] == [
        one.top_ids for one in outputs[1].prompt_logprobs
    ]
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            expected = torch.log_softmax(reference(torch.tensor([prompt])).logits[0], dim=-1)
        found = output.prompt_logprobs
        assert found is not None and len(found) == len(prompt) - 1
        for row, token, one in zip(expected, prompt[1:], found, strict=False):
            assert one.logprob == pytest.approx(float(row[token]), abs=1e-3)
            assert one.top_logprobs == pytest.approx(row.topk(4).values.tolist(), abs=1e-3)
            assert one.rank is not None
            assert abs(one.rank - 1 - int((row > row[token]).sum())) <= int(
                ((row - row[token]).abs() < 1e-3).sum()
            )


async def last_output(llm: LLM, prompt: list[int], params: SamplingParams) -> Any:
    chunks = [chunk async for chunk in llm.stream(prompt, params)]
    return chunks[-1].output


def saved(kind: str, more: dict[str, Any], path: Path) -> tuple[Any, Path]:
    """A model of random weights for eager reference, and its directory."""
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(3)
    config = getattr(transformers, kind)(**(TINY | more))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.save_pretrained(path)
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(path / "tokenizer.json"))
    return model, path
