"""Our attention as Hugging Face models call it: through `AttentionInterface`, on packed rows.

The model's modules find the forward pass they belong to in a context variable, set around each
call of the model.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface

from chiron_engine.model.attention import AttentionBackend, AttentionBatch, ScoreRule
from chiron_engine.model.errors import ModelError
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.spec import LayerGeometry

NAME = "chiron_paged"

# What modules pass along that does not change what causal attention without dropout computes.
_HARMLESS = {
    "attention_mask",
    "position_ids",
    "cache_position",
    "use_cache",
    "past_key_values",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "layer_idx",
    "position_embeddings",
    "logits_to_keep",
    "deterministic",
}


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer asks of attention, seen on its first call.

    geometry: as stored; keys and values of unlike size are both stored with the larger one.
    """

    geometry: LayerGeometry
    window: int | None
    softcap: float | None
    sinks: bool


class Probe:
    """A first forward of one token, in which every layer says what it needs. The answer of each
    is that of attention to itself alone."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerAttention] = {}

    def attend(self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: ScoreRule) -> Any:
        index, kind = layer_index(module), type(module).__name__
        if index in self.layers:
            raise ModelError(f"{kind} calls attention twice for layer {index}, which is not supported")
        if v.shape[:-1] != k.shape[:-1]:
            raise ModelError(f"{kind} has keys {list(k.shape)} unlike values {list(v.shape)}")
        if q.shape[1] % k.shape[1]:
            raise ModelError(f"{kind} has {q.shape[1]} query heads for {k.shape[1]} key heads")
        geometry = LayerGeometry(k.shape[1], max(k.shape[3], v.shape[3]))
        self.layers[index] = LayerAttention(geometry, rule.window, rule.softcap, rule.sinks is not None)
        return v.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(1, 2)


class PagedForward:
    """One forward pass over the pool. `windows` come from the configuration."""

    def __init__(
        self,
        backend: AttentionBackend,
        batch: AttentionBatch,
        pool: KvPool,
        windows: tuple[int | None, ...],
    ) -> None:
        self._backend, self._batch, self._pool, self._windows = backend, batch, pool, windows

    def attend(self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: ScoreRule) -> Any:
        index = layer_index(module)
        size = v.shape[-1]
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
        if k.shape[-1] != size:
            # As latent attention has it. Zeros change no score; those of the values are cut off again.
            q, k, v = (_widened(tensor, max(k.shape[-1], size)) for tensor in (q, k, v))
        rule = replace(rule, window=self._windows[index])
        out = self._backend.attend(index, q, k, v, self._pool, self._batch, rule)
        return out[None, ..., :size]


def _widened(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """[..., D] with zeros appended: [..., size]."""
    return pad(tensor, (0, size - tensor.shape[-1]))


FORWARD: ContextVar[Probe | PagedForward] = ContextVar("chiron_forward")


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, Hq, T, D], key [1, Hkv, T, D] and value [1, Hkv, T, V]; returns ([1, T, Hq, V], None).
    Raises ModelError for an option that is not implemented."""
    unknown = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
    if unknown:
        raise ModelError(f"{type(module).__name__} asks attention for {unknown[0]}, which is not supported")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or dropout or not causal:
        raise ModelError(f"{type(module).__name__} is not plain causal attention, which is not supported")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    rule = ScoreRule(float(scaling), sliding_window, softcap, s_aux)
    return FORWARD.get().attend(module, query, key, value, rule), None


def layer_index(module: Any) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise ModelError(f"{type(module).__name__} has no layer number, which is not supported")
    return index


AttentionInterface.register(NAME, paged_attention)
