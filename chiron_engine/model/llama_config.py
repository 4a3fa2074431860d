"""config.json of the Llama family, as numbers. What would change the answer and is not
implemented is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chiron_engine.model.errors import ModelError
from chiron_engine.model.rope import RopeSettings


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """windows: per layer, the keys a row sees; None is all. qkv_bias, output_bias, mlp_bias: which
    projections have a bias. qk_norm: RMSNorm on each query and key head before rotation (Qwen3)."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope: RopeSettings
    windows: tuple[int | None, ...]
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool


ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_POSITIVE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def architecture_of(config: dict[str, Any]) -> str:
    """The class a model's config.json names. Raises ModelError where it names none or several."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"config.json: architectures must name one class, not {names!r}")
    return names[0]


def parse_config(config: dict[str, Any]) -> LlamaConfig:
    """Raises ModelError for what is missing, malformed or not implemented."""
    architecture = architecture_of(config)
    sizes = {name: _positive(config, name) for name in _POSITIVE}
    heads = sizes["num_attention_heads"]
    kv_heads = _positive(config, "num_key_value_heads", heads if architecture == ARCHITECTURES[0] else None)
    if heads % kv_heads:
        raise ModelError(f"config.json: {heads} attention heads are no multiple of {kv_heads} key heads")
    _refuse(config)
    head_dim = _head_dim(config, architecture, sizes["hidden_size"], heads)
    attention_bias = bool(config.get("attention_bias", False))
    llama, qwen2, qwen3 = (architecture == ARCHITECTURES[i] for i in (0, 2, 3))
    eps = config.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, float | int) or not 0 < eps < 1:
        raise ModelError(f"config.json: rms_norm_eps must be a small positive number, not {eps!r}")
    return LlamaConfig(
        architecture=architecture,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=sizes["vocab_size"],
        max_position=sizes["max_position_embeddings"],
        norm_eps=float(eps),
        rope=_rope(config, head_dim),
        windows=_windows(config, architecture, sizes["num_hidden_layers"]),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qwen2 or ((llama or qwen3) and attention_bias),
        output_bias=(llama or qwen3) and attention_bias,
        mlp_bias=llama and bool(config.get("mlp_bias", False)),
        qk_norm=qwen3,
    )


def _positive(config: dict[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {name} must be a positive integer, not {value!r}")
    return value


def _head_dim(config: dict[str, Any], architecture: str, hidden_size: int, heads: int) -> int:
    # Qwen3's class defaults to 128 where the others divide the hidden size.
    default = 128 if architecture == "Qwen3ForCausalLM" else hidden_size // heads
    head_dim = _positive(config, "head_dim", default)
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim {head_dim} is odd, which rotary embeddings cannot be")
    return head_dim


def _refuse(config: dict[str, Any]) -> None:
    quantised = config.get("quantization_config")
    if quantised and not _scales_kv_alone(quantised):
        raise ModelError("config.json: quantization_config: quantised checkpoints are not supported")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"config.json: hidden_act {activation!r} is not supported, only silu")


def _scales_kv_alone(quantised: Any) -> bool:
    """Whether a quantization_config leaves the weights as they are, and gives a scale for the keys and one
    for the values of each layer: then it changes nothing but what KV of 8 bits is divided by."""
    if not isinstance(quantised, dict) or quantised.get("quant_method") != "compressed-tensors":
        return False
    scheme = quantised.get("kv_cache_scheme")
    if quantised.get("config_groups") or not isinstance(scheme, dict):
        return False
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    return not scheme.get("dynamic") and all(scheme.get(name) == value for name, value in wanted.items())


def _rope(config: dict[str, Any], head_dim: int) -> RopeSettings:
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        raise ModelError("config.json: rope parameters that differ by layer are not supported")
    for where in (config, parameters):
        if where.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError("config.json: partial_rotary_factor other than 1 is not supported")
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    if not isinstance(theta, float | int) or theta <= 1:
        raise ModelError(f"config.json: rope_theta must be a number over 1, not {theta!r}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    position = _positive(config, "max_position_embeddings")
    return RopeSettings(head_dim, float(theta), str(kind), dict(parameters), position)


def _windows(config: dict[str, Any], architecture: str, layers: int) -> tuple[int | None, ...]:
    if architecture == "LlamaForCausalLM":
        return (None,) * layers
    if architecture == "MistralForCausalLM":
        # Absent means the class's default; null means none.
        return (_window(config.get("sliding_window", 4096)),) * layers
    window = _window(config.get("sliding_window")) if config.get("use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(layers))
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(known):
        raise ModelError(f"config.json: layer_types must be {layers} of {', '.join(known)}")
    return tuple(known[kind] for kind in kinds)


def _window(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: sliding_window must be a positive integer or null, not {value!r}")
    return value
