"""config.json out of a GGUF file's metadata. What would change the answer and has no counterpart here
is refused by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from chiron_engine.model.errors import ModelError
from chiron_engine.model.gguf_file import GgufFile

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LLAMA3_FACTORS = "rope_freqs.weight"

# The keys under the architecture's name that are read below, or that change no answer.
_KNOWN = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "tensor_data_layout",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.causal",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """What config.json says of the model, the token ids left out. Raises ModelError."""
    arch = file.text("general.architecture")
    if arch not in _CLASSES:
        raise file.fail(f"the architecture {arch!r} is not supported, only {', '.join(_CLASSES)}")
    _refuse_unknown(file, arch)
    hidden, heads = file.size(f"{arch}.embedding_length"), _heads(file, f"{arch}.attention.head_count")
    head_dim = file.size(f"{arch}.attention.key_length", hidden // heads)
    _check_head(file, arch, head_dim)
    return {
        **_class(file, arch),
        "hidden_size": hidden,
        "intermediate_size": file.size(f"{arch}.feed_forward_length"),
        "num_hidden_layers": _layers(file, arch),
        "num_attention_heads": heads,
        "num_key_value_heads": _heads(file, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.size(f"{arch}.context_length"),
        "rms_norm_eps": file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, arch, head_dim),
        # The table may have more rows than the tokenizer has tokens.
        "vocab_size": file.shape("token_embd.weight")[0],
        "attention_bias": arch != "qwen2" and "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": arch == "llama" and "blk.0.ffn_down.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float32",
    }


def _refuse_unknown(file: GgufFile, arch: str) -> None:
    known = {f"{arch}.{key}" for key in _KNOWN}
    for key in file.keys_under(f"{arch}."):
        if key not in known:
            raise file.fail(f"{key} is {file.value(key)!r}, which is not supported")
    if not file.flag(f"{arch}.attention.causal", True):
        raise file.fail(f"{arch}.attention.causal is false: only decoders are supported")


def _heads(file: GgufFile, key: str, default: int | None = None) -> int:
    """A number of heads, which may be given for each layer."""
    value = file.value(key)
    if not isinstance(value, list):
        return file.size(key, default)
    if len(set(value)) != 1:
        raise file.fail(f"{key} differs by layer ({value}), which is not supported")
    return int(value[0])


def _layers(file: GgufFile, arch: str) -> int:
    layers = file.size(f"{arch}.block_count")
    if layers > len(file.tensors):
        raise file.fail(f"{arch}.block_count is {layers}, but there are only {len(file.tensors)} tensors")
    return layers


def _check_head(file: GgufFile, arch: str, head_dim: int) -> None:
    if head_dim % 2:
        raise file.fail(f"heads of {head_dim} are odd, which rotary embeddings cannot be")
    for key in ("attention.value_length", "rope.dimension_count"):
        size = file.integer(f"{arch}.{key}", head_dim)
        if size != head_dim:
            raise file.fail(f"{arch}.{key} is {size}, but heads of {head_dim} need {head_dim}")


def _class(file: GgufFile, arch: str) -> dict[str, Any]:
    window = file.integer(f"{arch}.attention.sliding_window", 0)
    if not window:
        return {"architectures": [_CLASSES[arch]], "model_type": arch}
    if arch != "llama":
        raise file.fail(f"{arch}.attention.sliding_window is {window}, which is supported for llama only")
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}


def _rope(file: GgufFile, arch: str, head_dim: int) -> dict[str, Any]:
    theta = file.number(f"{arch}.rope.freq_base", 10000.0)
    if theta <= 1:
        raise file.fail(f"{arch}.rope.freq_base must be over 1, not {theta}")
    scaling = _scaling(file, arch)
    if LLAMA3_FACTORS in file.tensors:
        if scaling["rope_type"] != "default":
            raise file.fail(f"{LLAMA3_FACTORS} beside rope scaling {scaling['rope_type']} is not supported")
        scaling = _llama3(file, theta, head_dim)
    return {"rope_theta": theta, **scaling}


def _scaling(file: GgufFile, arch: str) -> dict[str, Any]:
    # Without a type a factor means linear, and 0 means that there is none.
    kind = file.text(f"{arch}.rope.scaling.type", "linear")
    factor = file.number(f"{arch}.rope.scaling.factor", file.number(f"{arch}.rope.scale_linear", 0.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise file.fail(f"{arch}.rope.scaling.type {kind!r} is not supported, only none, linear and yarn")
    if factor <= 0:
        raise file.fail(f"{arch}.rope.scaling.factor must be positive for {kind}, not {factor}")
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    context = file.size(f"{arch}.context_length")
    return {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": file.size(
            f"{arch}.rope.scaling.original_context_length", context
        ),
        "beta_fast": file.number(f"{arch}.rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": file.number(f"{arch}.rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, which the file holds as a divisor for each frequency: its parameters.

    Between the kept and the fully divided frequencies the share kept is a line over the frequency,
    (original / 2 pi * frequency - low) / (high - low). A line has two parameters, so that `low`
    may be chosen: it is 1, as published.
    """
    if file.shape(LLAMA3_FACTORS) != (head_dim // 2,):
        raise _odd_factors(file, f"has shape {list(file.shape(LLAMA3_FACTORS))}, not [{head_dim // 2}]")
    divisors = file.weights(LLAMA3_FACTORS).astype(np.float64)
    factor = round(float(divisors.max()), 4)
    if np.allclose(divisors, 1.0):
        return {"rope_type": "default"}
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    between = (divisors > 1.0001) & (divisors < factor * 0.9999)
    if between.sum() < 2 or divisors.min() <= 0:
        raise _odd_factors(file, "does not determine Llama 3's scaling")
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(frequencies[between], kept[between], 1)
    if offset >= 0 or slope <= 0:
        raise _odd_factors(file, "is not of Llama 3's scaling")
    high = round(1 - 1 / offset, 3)
    original = round(slope * 2 * math.pi * (high - 1))
    again = np.clip((original / (2 * math.pi) * frequencies - 1) / (high - 1), 0, 1)
    if not np.allclose(1 / divisors, (1 - again) / factor + again, rtol=1e-3):
        raise _odd_factors(file, "is not of Llama 3's scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _odd_factors(file: GgufFile, what: str) -> ModelError:
    return file.fail(f"{LLAMA3_FACTORS} {what}: these rope factors are not supported")
