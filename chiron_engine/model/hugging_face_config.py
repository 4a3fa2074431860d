"""What a Hugging Face configuration says that changes attention: windows, context, and what is not
implemented. Works on the configuration object alone."""

from __future__ import annotations

from typing import Any

from chiron_engine.model.errors import ModelError

_OTHER_MEDIA = ("text_config", "vision_config", "audio_config", "audio_encoder_config")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "seq_length")
_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def refuse_unsupported(config: Any) -> None:
    """Raise ModelError, naming the field, for what packed rows over paged KV cannot run."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder: only decoders are supported")
    media = [name for name in _OTHER_MEDIA if getattr(config, name, None) is not None]
    if media:
        raise ModelError(f"{kind} is multimodal ({media[0]}): only text models are supported")
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{kind}: quantization_config: quantised checkpoints are not supported")
    unknown = set(getattr(config, "layer_types", None) or ()) - {_FULL, _SLIDING, _CHUNKED}
    if unknown:
        raise ModelError(f"{kind} has layers of type {sorted(unknown)[0]!r}, which are not supported")


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Per layer, the keys a row may see by the configuration; None is all."""
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        if getattr(config, "attention_chunk_size", None):
            raise ModelError(f"{config.model_type}: attention_chunk_size is not supported")
        return (window,) * layers
    if _CHUNKED in kinds:
        raise ModelError(f"{config.model_type}: layers of type {_CHUNKED!r} are not supported")
    if _SLIDING in kinds and not isinstance(window, int):
        raise ModelError(f"{config.model_type}: sliding layers need sliding_window, not {window!r}")
    return tuple(window if kind == _SLIDING else None for kind in kinds)


def context_length(config: Any) -> int:
    """Tokens the model was made for. Where long contexts use another set of rotary frequencies
    (longrope) a packed batch cannot mix the two: the context ends where the first set does."""
    found = [getattr(config, name, None) for name in _CONTEXT]
    lengths = [value for value in found if isinstance(value, int) and value > 0]
    if not lengths:
        raise ModelError(f"{config.model_type} gives no context length ({', '.join(_CONTEXT)})")
    return min([lengths[0], *_longrope_limits(config)])


def _longrope_limits(config: Any) -> list[int]:
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    limits = []
    for rope in sets:
        if rope.get("rope_type") != "longrope":
            continue
        limit = rope.get("original_max_position_embeddings")
        limit = limit or getattr(config, "original_max_position_embeddings", None)
        if not isinstance(limit, int):
            raise ModelError(f"{config.model_type}: longrope needs original_max_position_embeddings")
        limits.append(limit)
    return limits
