"""What the rest of the engine knows of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """The KV one attention layer stores for one token: `kv_heads` keys and values of `head_dim`."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A loaded model, without its weights.

    layers: one entry per attention layer, in the order of their layer numbers; they may differ.
    max_model_len: tokens (prompt and output) the model was made for.
    eos_token_ids: the ids that end a generation; may be empty.
    path: the directory with config.json, tokenizer.json, tokenizer_config.json and, where the
    model has one, generation_config.json.
    """

    name: str
    architecture: str
    layers: tuple[LayerGeometry, ...]
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    path: Path
