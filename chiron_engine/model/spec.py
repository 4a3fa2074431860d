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
    windows: of each layer, the keys a row sees, itself included, None for all; empty where no layer has one.
    """

    name: str
    architecture: str
    layers: tuple[LayerGeometry, ...]
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    path: Path
    windows: tuple[int | None, ...] = ()

    @property
    def unwindowed_layers(self) -> tuple[LayerGeometry, ...]:
        """Those in which a row sees all keys before it."""
        if not self.windows:
            return self.layers
        return tuple(layer for layer, window in zip(self.layers, self.windows, strict=True) if window is None)
