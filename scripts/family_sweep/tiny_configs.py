"""A tiny configuration of any model type: its default one with every size made small."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 4
VOCABULARY = 128
CONTEXT = 128
HIDDEN = 64
# Ids that configurations give a meaning; prompts are drawn from those above.
FIRST_PLAIN_TOKEN = 3

_HIDDEN_FIELDS = ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size")
_LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZES: dict[str, int] = {
    **dict.fromkeys(_HIDDEN_FIELDS, HIDDEN),
    **dict.fromkeys(_LAYER_FIELDS, LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), CONTEXT),
    **dict.fromkeys(("moe_num_experts", "num_experts", "num_local_experts", "n_routed_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "kv_channels", "qk_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "num_key_value_heads": 2,
    "hidden_size_per_layer_input": 8,
    "original_max_position_embeddings": 64,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "sliding_window_pattern": 2,
    "_sliding_window_pattern": 2,
    "max_window_layers": 1,
    "num_kv_shared_layers": 2,
    "query_pre_attn_scalar": 16,
}
# Of the sizes, those that say how many layers there are, and which of them.
_DEPTHS = {
    *_LAYER_FIELDS,
    "first_k_dense_replace",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "max_window_layers",
    "num_kv_shared_layers",
}
_FEED_FORWARD = 48
# What limits how far back a row sees, in tokens: made shorter than the prompts.
_SPANS: dict[str, int] = {
    "sliding_window": 6,
    "window_size": 6,
    "local_attention": 12,
    "attention_chunk_size": 8,
    "keep_window_size": 6,
    "index_topk": 4,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "block_size": 8,
    "floor_scale": 8,
}
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

# Latent attention: keys of all heads, whose head_dim is that of their rotated part.
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}

_CONV = {"layer_types": ["conv", "full_attention"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Where a type's fields depend on one another in ways the sizes above do not respect, or where its default
# configuration cannot be built. Lists of LAYERS entries are per layer.
_FIXES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 4.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    # As in the checkpoints there are: lfm2's default configuration has full attention everywhere.
    "lfm2": _CONV,
    "lfm2_moe": _CONV,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    # As for lfm2.
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "nemotron": {"num_key_value_heads": 2},
    "xmod": {"default_language": "en_XX"},
}

# What a type's default configuration is not valid without.
_NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": LAYERS,
            "num_kv_shared_layers": LAYERS,
        }
    }
}


def tiny_config(kind: str, **options: Any) -> Any:
    """The configuration of model type `kind`, small enough to build in a moment, with windows shorter
    than the sweep's prompts. options: fields to set besides."""
    default, sizes = _default(kind), _sizes(kind)
    if getattr(default, "text_config", None) is not None:
        return default
    known = default.to_dict()
    spans: dict[str, Any] = {name: span for name, span in _SPANS.items() if _is_size(known.get(name))}
    spans |= _short_rope(known.get("rope_parameters") or {})
    return type(default)(**(sizes | _per_layer(known) | spans | _FIXES.get(kind, {}) | options))


def narrow_config(kind: str, **options: Any) -> Any:
    """Of model type `kind` with its usual depth and windows, and only its widths made small: what the
    engine's self-check has to cut by itself."""
    default, sizes = _default(kind), _sizes(kind)
    if getattr(default, "text_config", None) is not None:
        return default
    depth = _depth(default.to_dict())
    widths = {name: size for name, size in sizes.items() if name not in _DEPTHS}
    fixes = {name: _repeated(value, depth) for name, value in _FIXES.get(kind, {}).items()}
    return type(default)(**(widths | fixes | options))


def default_fields(kind: str) -> dict[str, Any]:
    """The default configuration of model type `kind`."""
    fields: dict[str, Any] = _default(kind).to_dict()
    return fields


def _default(kind: str) -> Any:
    return CONFIG_MAPPING[kind](**_NEEDED.get(kind, {}))


def _sizes(kind: str) -> dict[str, Any]:
    known = default_fields(kind)
    sizes = {name: small for name, value in known.items() if (small := _smaller(name, value)) is not None}
    if known.get("kv_lora_rank"):
        sizes |= {name: value for name, value in _LATENT.items() if name in known}
    if "is_decoder" in known:
        sizes["is_decoder"] = True
    return sizes


def _depth(known: dict[str, Any]) -> int | None:
    return next((known[name] for name in _LAYER_FIELDS if name in known), None)


def _repeated(value: Any, depth: int | None) -> Any:
    """A list with an entry for each tiny layer, as long as the usual depth."""
    if depth is None or not isinstance(value, list) or len(value) != LAYERS:
        return value
    return (value * (depth // LAYERS + 1))[:depth]


def _smaller(name: str, value: Any) -> int | float | None:
    if name == "head_dim":
        return _SIZES[name]
    if name in _TOKEN_IDS:
        return None if value is None else _TOKEN_IDS[name]
    # Queries and keys of unit size, so that attention is far from uniform and a wrong position shows.
    if name in ("initializer_range", "init_std"):
        return HIDDEN**-0.5
    # Below the scores, so that a cap shows that is not applied.
    if name == "attn_logit_softcapping":
        return 1.0
    if not _is_size(value):
        return None
    if "intermediate_size" in name or "ffn" in name:
        return min(value, _FEED_FORWARD) if name != "ffn_config" else None
    return min(value, _SIZES[name]) if name in _SIZES else None


def _short_rope(rope: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rotary embeddings whose first context ends within the prompts, past which some scale attention.
    Not with longrope, where the engine's context ends there too."""
    if "original_max_position_embeddings" not in rope or rope.get("rope_type") == "longrope":
        return {}
    return {"rope_parameters": rope | {"original_max_position_embeddings": 16}}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _per_layer(known: dict[str, Any]) -> dict[str, list[Any]]:
    """Lists with an entry per layer, cut. Those that name kinds of layers get all kinds in turn."""
    layers = _depth(known)
    lists = {name: value for name, value in known.items() if isinstance(value, list) and len(value) == layers}
    return {name: _cut(value) for name, value in lists.items()}


def _cut(value: list[Any]) -> list[Any]:
    if not isinstance(value[0], str):
        return value[:LAYERS]
    kinds = list(dict.fromkeys(value))
    return [kinds[index % len(kinds)] for index in range(LAYERS)]
