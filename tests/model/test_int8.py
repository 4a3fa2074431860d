"""int8 weights and activations in the native decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import greedy, paged_logits, random_prompts, relative_error
from tiny_config import TINY

from chiron_engine.model import cpu_kernels
from chiron_engine.model.cpu_kernels import why_not_int8
from chiron_engine.model.errors import ModelError
from chiron_engine.model.loader import default_precision, load_model
from chiron_engine.model.precision import FLOAT32, INT8

CPU = torch.device("cpu")
Save = Callable[[Any], tuple[Any, Path]]
CLASSES = ("LlamaConfig", "Qwen2Config", "Qwen3Config", "MistralConfig")


@pytest.fixture
def int8_runs() -> None:
    if (reason := why_not_int8(CPU)) is not None:
        pytest.skip(reason)


needs_int8 = pytest.mark.usefixtures("int8_runs")


def tiny(config: str = "LlamaConfig") -> Any:
    """Three layers; sizes the kernel has to fill up."""
    import transformers

    return getattr(transformers, config)(**TINY)


@needs_int8
@pytest.mark.parametrize("config", CLASSES)
def test_logits_are_close_to_float32(save_tiny: Save, config: str) -> None:
    _, path = save_tiny(tiny(config))
    prompts = random_prompts(96)
    exact = paged_logits(load_model(path, precision=FLOAT32, device=CPU), prompts)
    rounded = paged_logits(load_model(path, precision=INT8, device=CPU), prompts)
    # Another order of weights or a wrong scale gives 0.8 and more.
    assert 0 < relative_error(rounded, exact) < 0.2


@needs_int8
def test_logits_do_not_depend_on_how_rows_are_batched(save_tiny: Save) -> None:
    _, path = save_tiny(tiny())
    model, prompts = load_model(path, precision=INT8, device=CPU), random_prompts(96)
    one, other = (paged_logits(model, prompts, seed=seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@needs_int8
def test_smollm2_says_what_float32_says_where_the_choice_is_clear(smollm2: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    model = load_model(smollm2, precision=INT8, device=CPU)
    said = greedy(model, tokenizer.encode("The capital of France is").ids, 6)
    assert "Paris" in tokenizer.decode(said)


def test_other_families_are_refused_by_name(save_tiny: Save) -> None:
    from transformers import GPT2Config

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 96}
    _, path = save_tiny(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    with pytest.raises(ModelError, match=r"int8 is for LlamaForCausalLM.* not for GPT2LMHeadModel"):
        load_model(path, precision=INT8, device=CPU)


def test_heads_too_large_are_refused_and_get_float32(save_tiny: Save) -> None:
    from transformers import LlamaConfig

    _, path = save_tiny(LlamaConfig(**(TINY | {"head_dim": 264})))
    with pytest.raises(ModelError, match="heads of even size up to 256, not of 264"):
        load_model(path, precision=INT8, device=CPU)
    assert default_precision(path, CPU) is FLOAT32


def test_a_cache_that_cannot_be_looked_into_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise PermissionError(13, "no such home of yours")

    monkeypatch.setattr(cpu_kernels, "cache_dir", no_home)
    assert "no such home" in str(cpu_kernels.open_kernels.__wrapped__())


@needs_int8
def test_a_broken_weight_is_refused_by_name(save_tiny: Save) -> None:
    from safetensors.torch import load_file, save_file

    _, path = save_tiny(tiny())
    file = path / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        load_model(path, precision=INT8, device=CPU)
