"""A Llama of two layers with random weights and a byte-level tokenizer, as a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.gateway.tiny_model import END, write_tiny_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": END + 1,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": END,
    "bos_token_id": END,
    "torch_dtype": "float32",
}


def write_tiny_llama(directory: Path) -> Path:
    write_tiny_model(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    save_file(_weights(), str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory


def _weights() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * 0.3

    tensors = {"model.embed_tokens.weight": matrix(END + 1, 64), "model.norm.weight": torch.ones(64)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}self_attn.q_proj.weight": matrix(64, 64),
            f"{prefix}self_attn.k_proj.weight": matrix(32, 64),
            f"{prefix}self_attn.v_proj.weight": matrix(32, 64),
            f"{prefix}self_attn.o_proj.weight": matrix(64, 64),
            f"{prefix}mlp.gate_proj.weight": matrix(128, 64),
            f"{prefix}mlp.up_proj.weight": matrix(128, 64),
            f"{prefix}mlp.down_proj.weight": matrix(64, 128),
            f"{prefix}input_layernorm.weight": torch.ones(64),
            f"{prefix}post_attention_layernorm.weight": torch.ones(64),
        }
    return tensors
