"""Model directories of the Llama family with random weights: a model's cost without its knowledge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WEIGHT_STD = 0.02

# Sizes as published in each model's config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
}


def config_of(shape: str) -> dict[str, Any]:
    """A config.json for the native decoder. Raises KeyError for a shape not in SHAPES."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        **SHAPES[shape],
    }


def layer_tensors(config: dict[str, Any], layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one decoder layer's tensors."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim
    prefix = f"model.layers.{layer}."
    yield prefix + "input_layernorm.weight", (hidden,)
    yield prefix + "post_attention_layernorm.weight", (hidden,)
    for name, rows, columns in (
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, hidden),
        ("mlp.gate_proj", middle, hidden),
        ("mlp.up_proj", middle, hidden),
        ("mlp.down_proj", hidden, middle),
    ):
        yield f"{prefix}{name}.weight", (rows, columns)


def outer_tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors outside the layers."""
    yield "model.norm.weight", (config["hidden_size"],)
    table = (config["vocab_size"], config["hidden_size"])
    yield "model.embed_tokens.weight", table
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", table


def write_random_llama(folder: Path, shape: str, device: torch.device) -> int:
    """Write a model directory of bfloat16 weights, a file a layer; returns its bytes of weights.

    Its tokenizer.json is an empty object: enough for an engine, which speaks token ids.
    """
    config = config_of(shape)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text("{}")
    generator = torch.Generator(device).manual_seed(0)
    parts = [list(layer_tensors(config, i)) for i in range(config["num_hidden_layers"])]
    parts.append(list(outer_tensors(config)))
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {key: _random(key, size, generator, device) for key, size in part}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _random(
    name: str, size: tuple[int, ...], generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(size, dtype=torch.bfloat16)
    drawn = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
    return (drawn * WEIGHT_STD).cpu()
