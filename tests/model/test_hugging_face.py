"""Models run through their Hugging Face class equal their own eager attention, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import eager_logits, paged_logits, random_prompts, relative_error

from chiron_engine.model import self_check
from chiron_engine.model.attention import TorchAttention
from chiron_engine.model.errors import ModelError
from chiron_engine.model.hugging_face import HuggingFaceModel
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.loader import load_model
from chiron_engine.model.precision import FLOAT32
from tests.model.tiny_config import TINY

Save = Callable[[Any], tuple[Any, Path]]
CPU = torch.device("cpu")

GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.18,
}
LATENT = TINY | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "softcap, alternating windows": (
        "Gemma2Config",
        TINY
        | {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    ),
    "learned positions": ("GPT2Config", GPT2 | {"bos_token_id": 1, "eos_token_id": 2}),
    "packed projections, window": ("Phi3Config", TINY | {"sliding_window": 6}),
    "sinks, experts, windows": (
        "GptOssConfig",
        TINY | {"head_dim": 16, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "experts, query norm": (
        "Qwen3MoeConfig",
        TINY | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "head size differs by layer": (
        "Gemma4TextConfig",
        TINY
        | {
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 6,
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "keys shared among layers": (
        "Gemma4TextConfig",
        TINY
        | {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 6,
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "latent, values narrower than keys": ("DeepseekV3Config", LATENT | {"v_head_dim": 8}),
    "latent, values wider than keys": ("DeepseekV3Config", LATENT | {"v_head_dim": 24}),
    "window only in the mask": (
        "PhimoeConfig",
        TINY | {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CHIRON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config_of(kind: str, options: dict[str, Any]) -> Any:
    import transformers

    return getattr(transformers, kind)(**options)


@pytest.mark.parametrize("name", MODELS)
def test_equals_eager(name: str, save_tiny: Save) -> None:
    reference, path = save_tiny(config_of(*MODELS[name]))
    model = load_model(path, precision=FLOAT32, device=CPU)
    assert isinstance(model, HuggingFaceModel)
    prompts = random_prompts(96)
    error = relative_error(paged_logits(model, prompts), eager_logits(reference, prompts))
    assert error < 1e-5


def test_equals_the_native_decoder(save_tiny: Save) -> None:
    from transformers import Qwen3Config

    _, path = save_tiny(Qwen3Config(**(TINY | {"head_dim": 16})))
    prompts = random_prompts(96)
    options: dict[str, Any] = {"precision": FLOAT32, "device": CPU}
    through_class = HuggingFaceModel(path, kernels=Kernels.TORCH, **options)
    native = load_model(path, **options)
    assert native.spec == through_class.spec
    assert relative_error(paged_logits(native, prompts), paged_logits(through_class, prompts)) < 1e-5


BERT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 4,
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "recurrent": (
        "MambaConfig",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1},
        "linear_attention",
    ),
    "positions from padding": ("RobertaConfig", BERT | {"is_decoder": True}, "padding id"),
    "several media": ("Phi4MultimodalConfig", {}, "vision_config"),
    "window without a size": (
        "Cohere2Config",
        TINY | {"sliding_window": None, "layer_types": ["sliding_attention"] * 3},
        "sliding_window",
    ),
    "encoder-decoder": ("T5Config", {}, "encoder-decoder"),
    "bidirectional": ("BertConfig", BERT, "causal"),
    "learned mask": ("DogeConfig", TINY, "causal attention"),
    "attention twice a layer": ("DiffLlamaConfig", TINY, "twice"),
    "chunked": (
        "Llama4TextConfig",
        TINY | {"head_dim": 16, "intermediate_size_mlp": 32},
        "chunked_attention",
    ),
    "own attention": (
        "BloomConfig",
        {"vocab_size": 96, "hidden_size": 32, "n_layer": 1, "n_head": 4},
        "replaced",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    kind, options, cause = REFUSED[name]
    config = config_of(kind, options)
    config.architectures = ["Anything"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=cause) as caught:
        HuggingFaceModel(tmp_path, precision=FLOAT32, device=CPU, kernels=Kernels.TORCH)
    assert "\n" not in str(caught.value)


def test_an_unknown_option_of_attention_is_refused() -> None:
    from chiron_engine.model.hugging_face_attention import paged_attention

    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ModelError, match="position_bias"):
        paged_attention(torch.nn.Identity(), q, q, q, None, position_bias=torch.zeros(3))


def test_missing_tensor_is_named(save_tiny: Save) -> None:
    from safetensors.torch import load_file, save_file

    _, path = save_tiny(config_of(*MODELS["packed projections, window"]))
    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load_model(path, precision=FLOAT32, device=CPU)


def test_the_verdict_is_kept(save_tiny: Save, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(*MODELS["packed projections, window"])
    self_check.check_architecture(config)
    (file,) = (own_cache / "self_check").iterdir()
    assert "error" in file.read_text()

    def never(model: Any) -> float:
        raise AssertionError("checked again")

    monkeypatch.setattr(self_check, "paged_error", never)
    self_check.check_architecture(config)
    file.write_text("{")
    with pytest.raises(ModelError, match="checked again"):
        self_check.check_architecture(config)


def test_a_window_the_backend_ignores_fails_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check sees what it is there for: here a backend that forgets windows."""
    attend = TorchAttention.attend

    def forgetful(self: Any, *arguments: Any) -> Any:
        *others, rule = arguments
        return attend(self, *others, replace(rule, window=None))

    monkeypatch.setattr(TorchAttention, "attend", forgetful)
    with pytest.raises(ModelError, match="differs from its own eager attention"):
        self_check.check_architecture(config_of(*MODELS["packed projections, window"]))


def test_longrope_ends_where_its_first_frequencies_do() -> None:
    from transformers import Phi3Config

    from chiron_engine.model.hugging_face_config import context_length

    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
    }
    config = Phi3Config(**(TINY | {"rope_parameters": rope, "original_max_position_embeddings": 32}))
    assert context_length(config) == 32
