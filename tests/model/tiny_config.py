"""The sizes of a tiny model."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Queries and keys of unit size: attention far from uniform, so that a wrong position shows.
    "initializer_range": 0.18,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
