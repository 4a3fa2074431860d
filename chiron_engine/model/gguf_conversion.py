"""A GGUF file of the Llama architecture with a GPT-2 style tokenizer, as a Hugging Face directory.

The weights are dequantised to float32, which holds every value of the block formats exactly or
nearly so; what is computed from them no longer depends on how they were packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from chiron_engine.model.directory import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS
from chiron_engine.model.errors import ModelError

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TOKEN = 3


def convert_llama_gguf(
    source: Path, target: Path, progress: Callable[[str, float], None] | None = None
) -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json and
    tokenizer_config.json into the directory `target`. Raises ModelError for another architecture
    or tokenizer."""
    report = progress or (lambda phase, fraction: None)
    report("read GGUF", 0.0)
    reader = gguf.GGUFReader(str(source))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture, tokenizer = fields["general.architecture"], fields.get("tokenizer.ggml.model")
    if architecture != "llama" or tokenizer != "gpt2" or fields.get("tokenizer.ggml.pre") != "smollm":
        raise ModelError(f"{source.name} is {architecture} with tokenizer {tokenizer}: not convertible")
    report("convert weights", 0.1)
    config = _config(fields)
    tensors = {}
    for index, tensor in enumerate(reader.tensors):
        tensors[_hugging_face_name(tensor.name)] = _weights(tensor, config)
        report("convert weights", 0.1 + 0.6 * (index + 1) / len(reader.tensors))
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    report("write weights", 0.7)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    report("write tokenizer", 0.95)
    _tokenizer(fields).save(str(target / TOKENIZER))
    _write_json(target / TOKENIZER_CONFIG, _tokenizer_config(fields))
    _write_json(target / CONFIG, config)
    _write_json(target / GENERATION_CONFIG, _token_ids(fields))
    report("converted", 1.0)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # Both are float32 in the file: the shortest decimal that gives the same float32.
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(str(np.float32(fields["llama.rope.freq_base"]))),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        **_token_ids(fields),
    }


def _token_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _hugging_face_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if not stem.startswith("blk."):
        return f"{_TOP_TENSORS[stem]}.{suffix}"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{suffix}"


def _weights(tensor: gguf.ReaderTensor, config: dict[str, Any]) -> np.ndarray:
    values = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    values = values.reshape(tuple(int(size) for size in reversed(tensor.shape)))
    if tensor.name.endswith("attn_q.weight"):
        values = _half_rotation(values, config["num_attention_heads"])
    elif tensor.name.endswith("attn_k.weight"):
        values = _half_rotation(values, config["num_key_value_heads"])
    return np.ascontiguousarray(values)


def _half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of each head, so that rotary pairs are neighbours; Hugging
    Face pairs element i with i + D / 2. weight: [heads * D, hidden]."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE with every digit a token of its own."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        **{key: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for key, name in named.items()},
        "chat_template": fields["tokenizer.chat_template"],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
