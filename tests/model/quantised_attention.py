"""What attention over a KV pool of 8 bits must give, in torch: attention over a wider pool, which holds what
was stored, multiplied with its scale."""

from __future__ import annotations

import torch
from chiron_kernels.reference.kv_write import to_stored

from chiron_engine.model.attention import AttentionBatch, ScoreRule, TorchAttention
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.kv_scales import KvScales, LayerScales

EIGHT_BITS = torch.float8_e4m3fn


class QuantisedAttention(TorchAttention):
    """In float32, on a pool of float32."""

    def __init__(self, scales: LayerScales) -> None:
        super().__init__()
        self._scales = scales

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool: KvPool,
        batch: AttentionBatch,
        rule: ScoreRule,
    ) -> torch.Tensor:
        scales = self._scales.get(layer, KvScales())
        keys, values = read_back(k, scales.keys), read_back(v, scales.values)
        return super().attend(layer, q.float(), keys, values, pool, batch, rule).to(q.dtype)


def read_back(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x after it was stored in 8 bits, float32."""
    return to_stored(x, scale, EIGHT_BITS).float() * scale
