"""The scales of 8-bit keys and values that a checkpoint may bring, by the names other engines read.

| name, behind `layers.N.self_attn.` | written by |
|---|---|
| `k_scale`, `v_scale` | llm-compressor (compressed-tensors) |
| `attn.k_scale`, `attn.v_scale` | vLLM's own names |
| `k_proj.k_scale`, `v_proj.v_scale`, `qkv_proj.k_scale`, `qkv_proj.v_scale` | ModelOpt |
| `k_proj.output_scale`, `v_proj.output_scale` | Quark, compressed-tensors of old |

What is stored, times its scale, is the key or the value. Beside them may be scales of queries and
probabilities, for attention that computes in 8 bits; ours does not, and reads over them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from chiron_kernels.gpu.paged_kv import LARGEST_SCALE, LEAST_SCALE

from chiron_engine.model.checkpoint import Checkpoint
from chiron_engine.model.errors import ModelError


@dataclass(frozen=True, slots=True)
class KvScales:
    """Of one layer: how many times the stored number a key is, and a value."""

    keys: float = 1.0
    values: float = 1.0


LayerScales = Mapping[int, KvScales]
"""By layer number; of layers that are not there both are 1."""

_LAYER = r"(?:.+\.)?layers\.(?P<layer>\d+)\.self_attn\."
_STORED = re.compile(
    _LAYER
    + r"(?:(?:(?:attn|k_proj|v_proj|qkv_proj)\.)?(?P<part>[kv])_scale|(?P<output>[kv])_proj\.output_scale)"
)
_UNUSED = re.compile(
    _LAYER + r"(?:(?:(?:attn|q_proj|qkv_proj)\.)?(?:q|prob)_scale|q_proj\.output_scale|prob_output_scale)"
)
_FIELDS = {"k": "keys", "v": "values"}


def is_attention_scale(name: str) -> bool:
    """Whether a tensor of this name is for attention in 8 bits alone."""
    return any(pattern.fullmatch(name) for pattern in (_STORED, _UNUSED))


def read_kv_scales(weights: Checkpoint) -> LayerScales:
    """All scales of keys and values in the checkpoint. Raises ModelError for one that is not one number, or
    out of bounds, and for two of the same."""
    found: dict[int, KvScales] = {}
    source: dict[tuple[int, str], str] = {}
    for name in weights.names():
        match = _STORED.fullmatch(name)
        if match is None:
            continue
        layer, field = int(match["layer"]), _FIELDS[match["part"] or match["output"]]
        other = source.setdefault((layer, field), name)
        if other != name:
            raise ModelError(f"{other} and {name} are both the scale of the {field} of layer {layer}")
        scale = weights.read_number(name)
        if not LEAST_SCALE <= scale <= LARGEST_SCALE:
            raise ModelError(f"{name} is {scale}; a scale must be {LEAST_SCALE:.3g} to {LARGEST_SCALE:.3g}")
        found[layer] = replace(found.get(layer, KvScales()), **{field: scale})
    return found
