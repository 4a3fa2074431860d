"""Models over Triton's kernels, interpreted where there is no GPU, equal their own eager attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import eager_logits, paged_logits, random_prompts, relative_error

from chiron_engine.model.kernel_choice import Kernels, named_kernels
from chiron_engine.model.loader import load_model
from chiron_engine.model.precision import FLOAT32, INT8
from tests.model.tiny_config import TINY
from tests.triton_interpreter import install

Save = Callable[[Any], tuple[Any, Path]]
CPU = torch.device("cpu")
WINDOWED = {"sliding_window": 6}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("LlamaConfig", TINY),
    "query and key norms": ("Qwen3Config", TINY | {"head_dim": 24}),
    "window": ("MistralConfig", TINY | WINDOWED),
    "softcap, alternating windows": (
        "Gemma2Config",
        TINY
        | WINDOWED
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "num_hidden_layers": 2,
        },
    ),
    "sinks": (
        "GptOssConfig",
        TINY
        | WINDOWED
        | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 2},
    ),
    "heads too large for the kernels": ("LlamaConfig", TINY | {"head_dim": 258, "num_hidden_layers": 1}),
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHIRON_CACHE", str(tmp_path / "cache"))
    install()


@pytest.mark.parametrize("name", MODELS)
def test_equals_eager(name: str, save_tiny: Save) -> None:
    import transformers

    kind, options = MODELS[name]
    reference, path = save_tiny(getattr(transformers, kind)(**options))
    model = load_model(path, precision=FLOAT32, device=CPU, kernels=named_kernels("triton", CPU))
    assert model.kernels is Kernels.TRITON
    prompts = random_prompts(96, (21, 6))
    error = relative_error(paged_logits(model, prompts), eager_logits(reference, prompts))
    assert error < 1e-5


def test_int8_is_refused(save_tiny: Save) -> None:
    from transformers import LlamaConfig

    _, path = save_tiny(LlamaConfig(**TINY))
    with pytest.raises(ValueError, match="int8 weights need the compiled CPU kernels"):
        load_model(path, precision=INT8, device=CPU, kernels=Kernels.TRITON)
