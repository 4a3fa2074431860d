"""KV of 8 bits: models over it, the scales of a checkpoint, and where it cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import paged_logits, random_prompts
from safetensors.torch import save_file

from chiron_engine.model.checkpoint import Checkpoint
from chiron_engine.model.errors import ModelError
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.kv_cache_dtype import check_kv_cache_dtype, with_kv_cache_dtype
from chiron_engine.model.kv_scales import KvScales, read_kv_scales
from chiron_engine.model.loader import load_model
from chiron_engine.model.precision import BFLOAT16, FLOAT16, FLOAT32, INT8, Precision
from tests.model.quantised_attention import EIGHT_BITS, add_tensors, reference, write_scales
from tests.model.tiny_config import TINY
from tests.triton_interpreter import install

Save = Callable[[Any], tuple[Any, Path]]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TIGHT = {0: KvScales(1 / 600, 1 / 400), 1: KvScales(1 / 300, 1 / 900)}
"""Of the first of two or three layers: so small that many numbers are over the largest. Nobody who leaves one
out, or takes another layer's, comes to the same."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("LlamaConfig", TINY),
    "query and key norms": ("Qwen3Config", TINY | {"head_dim": 24}),
    "window": ("MistralConfig", TINY | {"sliding_window": 6}),
    "softcap, alternating windows": (
        "Gemma2Config",
        TINY | {"sliding_window": 6, "head_dim": 16, "query_pre_attn_scalar": 16}
        | {"attn_logit_softcapping": 2.0, "num_hidden_layers": 2},
    ),
    "sinks": (
        "GptOssConfig",
        TINY | {"sliding_window": 6, "head_dim": 16, "num_hidden_layers": 2}
        | {"num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHIRON_CACHE", str(tmp_path / "cache"))
    install()


def distance(found: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Relative, of the Euclidean norms of all logits."""
    a, b = torch.cat(found), torch.cat(right)
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("name", "precision", "bound"),
    [*((name, FLOAT16, 8e-3) for name in MODELS), ("grouped heads", BFLOAT16, 2e-2)],
)
def test_equals_torch_over_the_same_8_bits(
    name: str, precision: Precision, bound: float, save_tiny: Save
) -> None:
    """Logits of chunks and decodes in mixed steps. Where 16 bits are rounded otherwise, a key or value in
    the middle between two of 8 bits becomes the other one: the bound has room for such."""
    import transformers

    kind, options = MODELS[name]
    _, path = save_tiny(getattr(transformers, kind)(**options))
    write_scales(path, TIGHT)
    of_8_bits = replace(precision, kv=EIGHT_BITS)
    model = load_model(path, precision=of_8_bits, device=CPU, kernels=Kernels.TRITON)
    prompts = random_prompts(96, (21, 6))
    found = paged_logits(model, prompts, dtype=EIGHT_BITS)
    assert distance(found, paged_logits(reference(path, precision, TIGHT), prompts, dtype=EIGHT_BITS)) < bound
    for other in ({}, TIGHT | {0: KvScales(1 / 600)}, TIGHT | {1: KvScales(1.0, 1 / 900)}):
        assert (
            distance(found, paged_logits(reference(path, precision, other), prompts, dtype=EIGHT_BITS))
            > 1.5 * bound
        )


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("qkv_proj.k_scale", "qkv_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_names_of_scales(keys: str, values: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {
        f"model.layers.0.self_attn.{keys}": torch.full(shape, 0.5),
        f"model.layers.0.self_attn.{values}": torch.full(shape, 2.0, dtype=torch.bfloat16),
        f"model.language_model.layers.11.self_attn.{values}": torch.full(shape, 3.0),
        "model.layers.1.self_attn.k_proj.weight_scale": torch.ones(shape),
        "model.layers.1.mlp.k_scale": torch.ones(shape),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    scales = read_kv_scales(Checkpoint(tmp_path, torch.float16, CPU))
    assert scales == {0: KvScales(0.5, 2.0), 11: KvScales(1.0, 3.0)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"k_scale": 0.0}, r"layers\.0\.self_attn\.k_scale is 0\.0; a scale must be 1\.18e-38 to 8\.51e\+37"),
        ({"v_scale": -1.0}, r"v_scale is -1\.0"),
        ({"k_scale": 1e-40}, r"k_scale is 9.999.*e-41; a scale must be"),
        ({"v_proj.v_scale": float("inf")}, r"v_proj\.v_scale is inf"),
        ({"k_proj.output_scale": float("nan")}, r"k_proj\.output_scale is nan"),
        ({"k_scale": [1.0, 2.0]}, r"k_scale has shape \[2\]; it must be one number"),
        ({"k_scale": 1.0, "k_proj.k_scale": 2.0}, "are both the scale of the keys of layer 0"),
    ],
)
def test_scales_that_cannot_be_are_named(tensors: dict[str, Any], says: str, save_tiny: Save) -> None:
    from transformers import LlamaConfig

    _, path = save_tiny(LlamaConfig(**TINY))
    prefix = "model.layers.0.self_attn."
    add_tensors(path, {prefix + name: torch.tensor(value) for name, value in tensors.items()})
    of_8_bits = replace(BFLOAT16, kv=EIGHT_BITS)
    with pytest.raises(ModelError, match=says):
        load_model(path, precision=of_8_bits, device=CPU, kernels=Kernels.TRITON)
    load_model(path, precision=FLOAT32, device=CPU, kernels=Kernels.TORCH)


def test_scales_of_queries_are_read_over(save_tiny: Save) -> None:
    from transformers import LlamaConfig

    _, path = save_tiny(LlamaConfig(**TINY))
    names = ("q_scale", "attn.prob_scale", "q_proj.output_scale", "prob_output_scale")
    add_tensors(path, {f"model.layers.2.self_attn.{name}": torch.tensor(2.0) for name in names})
    load_model(path, precision=FLOAT32, device=CPU, kernels=Kernels.TORCH)
    add_tensors(path, {"model.layers.2.self_attn.k_proj.weight_scale": torch.tensor(2.0)})
    with pytest.raises(ModelError, match=r"1 tensors its config\.json does not account for"):
        load_model(path, precision=FLOAT32, device=CPU, kernels=Kernels.TORCH)


SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize(
    ("quantised", "allowed"),
    [
        ({"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME}, True),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"0": {}}, "kv_cache_scheme": SCHEME},
            False,
        ),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME | {"num_bits": 4}}, False),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME | {"dynamic": True}}, False),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, False),
        ({"quant_method": "fp8", "kv_cache_scheme": SCHEME}, False),
    ],
)
def test_a_config_may_quantise_kv_alone(quantised: dict[str, Any], allowed: bool, save_tiny: Save) -> None:
    from transformers import LlamaConfig

    _, path = save_tiny(LlamaConfig(**TINY))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    if allowed:
        load_model(path, precision=FLOAT32, device=CPU, kernels=Kernels.TORCH)
        return
    with pytest.raises(ModelError, match="quantised checkpoints are not supported"):
        load_model(path, precision=FLOAT32, device=CPU, kernels=Kernels.TORCH)


@pytest.mark.parametrize("kind", ["LlamaConfig", "GraniteConfig"])
def test_heads_too_large_for_the_kernels_are_refused(kind: str, save_tiny: Save) -> None:
    import transformers

    sizes = {"num_hidden_layers": 1, "head_dim": 258, "hidden_size": 4 * 258}
    _, path = save_tiny(getattr(transformers, kind)(**TINY | sizes))
    of_8_bits = replace(BFLOAT16, kv=EIGHT_BITS)
    with pytest.raises(
        ModelError, match="kv_cache_dtype fp8 is for heads of up to 256, and this model's are of 258"
    ):
        load_model(path, precision=of_8_bits, device=CPU, kernels=Kernels.TRITON)


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3"])
def test_where_8_bits_cannot_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_kv_cache_dtype(name, Kernels.TRITON, CPU)
    for kernels in (Kernels.COMPILED, Kernels.TORCH):
        with pytest.raises(
            ValueError, match=f"kv_cache_dtype is '{name}'.*here kernels is '{kernels.value}'"
        ):
            check_kv_cache_dtype(name, kernels, CPU)
        check_kv_cache_dtype("auto", kernels, CPU)
    with pytest.raises(ValueError, match="kv_cache_dtype is 'fp4'; it must be one of auto, fp8, fp8_e4m3"):
        check_kv_cache_dtype("fp4", Kernels.TRITON, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_kv_cache_dtype(name, Kernels.TRITON, CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 8\.9 or more; cuda:0 has 8\.6"):
        check_kv_cache_dtype(name, Kernels.TRITON, CUDA)


def test_the_precision_of_8_bits() -> None:
    assert with_kv_cache_dtype(BFLOAT16, "auto") is BFLOAT16
    found = with_kv_cache_dtype(BFLOAT16, "fp8")
    assert found == replace(BFLOAT16, kv=EIGHT_BITS) == with_kv_cache_dtype(BFLOAT16, "fp8_e4m3")
    assert [found.describe(), BFLOAT16.describe()] == ["bfloat16, KV float8_e4m3fn", "bfloat16"]
    for precision in (FLOAT32, INT8):
        with pytest.raises(ValueError, match=f"bfloat16 or float16; here dtype is {precision.name}"):
            with_kv_cache_dtype(precision, "fp8")
