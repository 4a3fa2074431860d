"""From the packed queries, keys and values of a layer to what its heads saw: norms of queries and keys,
rotation, KV write, attention. In steps with any backend, or with one launch before attention on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import rms_norm

from chiron_engine.model.attention import AttentionBackend, AttentionBatch, ScoreRule
from chiron_engine.model.decoder_ops import DecoderOps
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.rope import Angles


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of every layer. eps: of their norms, where they have any."""

    queries: int
    keys: int
    dim: int
    eps: float


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights [D] of the root-mean-square norms of queries and keys (Qwen3)."""

    query: torch.Tensor
    key: torch.Tensor


class SelfAttention(Protocol):
    def attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        angles: Angles,
        batch: AttentionBatch,
        pool: KvPool,
        rule: ScoreRule,
    ) -> torch.Tensor:
        """qkv [T, (Hq + 2 Hkv) D], which may be changed in place; angles as `Rope.angles` gives them.
        Returns [T, Hq D]."""
        ...


class SteppedSelfAttention:
    """Norms, rotation and attention one after another."""

    def __init__(self, heads: Heads, ops: DecoderOps, backend: AttentionBackend) -> None:
        self._heads, self._ops, self._backend = heads, ops, backend

    def attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        angles: Angles,
        batch: AttentionBatch,
        pool: KvPool,
        rule: ScoreRule,
    ) -> torch.Tensor:
        heads = self._heads
        queries, keys = heads.queries, heads.keys
        packed = qkv.view(qkv.shape[0], -1, heads.dim)
        turned, v = packed, packed[:, queries + keys :]
        if norms is not None:
            q = self._normalised(packed[:, :queries], norms.query)
            k = self._normalised(packed[:, queries : queries + keys], norms.key)
            turned = torch.cat((q, k), dim=1)
        q, k = self._ops.rotated(turned, queries + keys, angles).split((queries, keys), dim=1)
        return self._backend.attend(layer, q, k, v, pool, batch, rule).flatten(1)

    def _normalised(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight.shape, weight, self._heads.eps)
