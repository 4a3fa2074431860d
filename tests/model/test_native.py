"""The native decoder against the Hugging Face classes it stands for, on tiny random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import eager_logits, paged_logits, random_prompts, relative_error

from chiron_engine.model.errors import ModelError
from chiron_engine.model.llama_config import parse_config
from chiron_engine.model.loader import load_model
from chiron_engine.model.native import LlamaModel
from chiron_engine.model.precision import BFLOAT16, FLOAT32
from tests.model.tiny_config import TINY

Save = Callable[[Any], tuple[Any, Path]]
CPU = torch.device("cpu")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, all biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied, wide heads": ("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama, one key head": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama, linear rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ),
    "llama, llama3 rope": ("LlamaConfig", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama, yarn rope": ("LlamaConfig", {"rope_parameters": YARN, "head_dim": 16}),
    "llama, yarn with mscale": (
        "LlamaConfig",
        {
            "rope_parameters": YARN
            | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16, "truncate": False}
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral, window": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3, bias and window": (
        "Qwen3Config",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def tiny(case: str) -> Any:
    import transformers

    kind, options = CASES[case]
    return getattr(transformers, kind)(**(TINY | options))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_hugging_face_class(case: str, save_tiny: Save) -> None:
    reference, path = save_tiny(tiny(case))
    model = load_model(path, precision=FLOAT32, device=CPU)
    assert isinstance(model, LlamaModel)
    prompts = random_prompts(96)
    error = relative_error(paged_logits(model, prompts), eager_logits(reference, prompts))
    assert error < 1e-5


def test_bfloat16_stays_near_float32(save_tiny: Save) -> None:
    reference, path = save_tiny(tiny("qwen2"))
    prompts = random_prompts(96)
    exact = eager_logits(reference, prompts)
    theirs = relative_error(eager_logits(reference.bfloat16(), prompts), exact)
    model = load_model(path, precision=BFLOAT16, device=CPU)
    assert model.precision is BFLOAT16
    model_logits = packed_bfloat16(model, prompts)
    assert relative_error(model_logits, exact) < max(2 * theirs, 0.02)


def packed_bfloat16(model: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    from chiron_engine.model.attention import AttentionBatch, ChunkRows
    from chiron_engine.model.kv_pool import KvPool

    out = []
    none = torch.empty(0, dtype=torch.int64)
    for prompt in prompts:
        position = torch.arange(len(prompt))
        pool = KvPool(4, 16, model.spec.layers, torch.bfloat16)
        rows, table = ChunkRows(0, len(prompt), 0, slot=0), torch.arange(pool.num_blocks)
        batch = AttentionBatch(0, table[None], none, none, 0, [rows], position // 16, position % 16)
        with torch.inference_mode():
            out.append(model.forward(prompt, position, batch, pool, position))
    return out


def test_only_sampled_rows_get_logits(save_tiny: Save) -> None:
    _, path = save_tiny(tiny("llama"))
    model = load_model(path, precision=FLOAT32, device=CPU)
    prompt = random_prompts(96, (12,))
    whole = paged_logits(model, prompt)[0]
    assert whole.dtype == torch.float32 and whole.shape == (12, 96)


def test_the_spec_tells_the_model(save_tiny: Save) -> None:
    _, path = save_tiny(tiny("qwen3"))
    spec = load_model(path, precision=FLOAT32, device=CPU).spec
    assert spec.architecture == "Qwen3ForCausalLM" and spec.vocab_size == 96
    assert [(layer.kv_heads, layer.head_dim) for layer in spec.layers] == [(2, 16)] * 3
    assert spec.max_model_len == 128 and spec.eos_token_ids == (2,) and spec.path == path


BASE = {
    "architectures": ["LlamaForCausalLM"],
    **{key: TINY[key] for key in TINY if key not in ("pad_token_id", "initializer_range")},
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": None}, "architectures"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "no multiple of 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": "all"}, "sliding_window"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["linear_attention"] * 3},
            "layer_types",
        ),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    from chiron_engine.model.rope import inverse_frequencies

    with pytest.raises(ModelError, match=named) as caught:
        inverse_frequencies(parse_config(BASE | change).rope)
    assert "\n" not in str(caught.value)


def test_old_and_new_rope_fields_mean_the_same() -> None:
    from chiron_engine.model.rope import inverse_frequencies

    old = parse_config(BASE | {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = parse_config(
        BASE | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}}
    )
    assert torch.equal(inverse_frequencies(old.rope)[0], inverse_frequencies(new.rope)[0])


def test_defaults_are_those_of_each_class() -> None:
    mistral = parse_config(BASE | {"architectures": ["MistralForCausalLM"]})
    assert mistral.windows == (4096,) * 3
    qwen3 = parse_config(BASE | {"architectures": ["Qwen3ForCausalLM"]})
    assert qwen3.head_dim == 128 and qwen3.qk_norm and not qwen3.qkv_bias
    assert parse_config(BASE | {"architectures": ["Qwen2ForCausalLM"]}).qkv_bias


def test_loading_runs_no_modelling_code_of_transformers(save_tiny: Save) -> None:
    import subprocess
    import sys

    _, path = save_tiny(tiny("llama"))
    code = (
        "import sys, pathlib, torch\n"
        "from chiron_engine.model.loader import load_model\n"
        "from chiron_engine.model.precision import FLOAT32\n"
        f"load_model(pathlib.Path({str(path)!r}), precision=FLOAT32, device=torch.device('cpu'))\n"
        "print('transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "False", out.stderr


def test_code_that_comes_with_a_model_is_never_run(save_tiny: Save, tmp_path: Path) -> None:
    _, path = save_tiny(tiny("llama"))
    sentinel = tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\n")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (path / "config.json").write_text(json.dumps(config))
    load_model(path, precision=FLOAT32, device=CPU)
    config |= {"model_type": "unheard_of", "architectures": ["Evil"]}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="auto_map"):
        load_model(path, precision=FLOAT32, device=CPU)
    assert not sentinel.exists()
