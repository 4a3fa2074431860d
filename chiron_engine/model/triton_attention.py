"""Attention by Triton's kernels: one launch for the decoding rows of a step and one for its chunks, which
differ too much for one kernel to be quick at both. A prefix that decoding rows share has launches of its own
in layers that see all of it. Nothing is read back from the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from chiron_kernels.gpu.cascade_attention import CascadeStep, cascade_attention, cascade_step
from chiron_kernels.gpu.checks import HALVES
from chiron_kernels.gpu.decode_attention import decode_attention
from chiron_kernels.gpu.decode_plan import DecodeSplits
from chiron_kernels.gpu.decode_splits import decode_splits
from chiron_kernels.gpu.kv_write import kv_write
from chiron_kernels.gpu.paged_kv import EIGHT_BITS, LARGEST_HEAD
from chiron_kernels.gpu.prefill_attention import prefill_attention
from chiron_kernels.gpu.query_blocks import QueryBlocks, query_blocks
from chiron_kernels.gpu.rope_kv import rope_kv_write
from chiron_kernels.shared_prefixes import SharedPrefixes

from chiron_engine.model.attention import AttentionBatch, ScoreRule, TorchAttention
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.kv_scales import KvScales, LayerScales
from chiron_engine.model.rope import Angles
from chiron_engine.model.self_attention import HeadNorms, Heads

_UNSCALED = KvScales()


@dataclass(slots=True, eq=False)
class _Chunks:
    """The chunks of a forward pass, which begin at row `first`, on the device: starts int64 [C + 1] counted
    from there, contexts and slots int64 [C]. longest: tokens of the longest context with its chunk."""

    first: int
    starts: torch.Tensor
    contexts: torch.Tensor
    slots: torch.Tensor
    longest: int


class TritonAttention:
    """Heads over LARGEST_HEAD go through torch. scales: of a pool of 8 bits."""

    def __init__(self, scales: LayerScales | None = None) -> None:
        self._scales = scales or {}
        self._torch = TorchAttention()
        self._chunks: _Chunks | None = None
        self._splits: dict[tuple[torch.Size, int | None], DecodeSplits] = {}
        self._cascades: dict[tuple[torch.Size, int], CascadeStep] = {}
        self._blocks: dict[tuple[int, int], QueryBlocks] = {}

    def begin(self, batch: AttentionBatch, pool: KvPool) -> None:
        self._torch.begin(batch, pool)
        self._splits.clear()
        self._cascades.clear()
        self._blocks.clear()
        self._chunks = _uploaded_chunks(batch, pool.device) if batch.chunks else None

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
        if q.shape[2] > LARGEST_HEAD:
            return self._torch.attend(layer, q, k, v, pool, batch, rule)
        # Some models turn queries and keys in float32, and give heads apart.
        if pool.dtype == EIGHT_BITS:
            written = torch.promote_types(k.dtype, v.dtype)
            computed = q.dtype if q.dtype in HALVES else torch.float16
        else:
            written = computed = pool.dtype
        places, scales = (batch.write_blocks, batch.write_offsets), self.scales_of(layer)
        kv_write(k.to(written), v.to(written), pool.kv(layer), *places, scales.keys, scales.values)
        out = self.attend_stored(layer, q.to(computed).contiguous(), pool, batch, rule)
        return out.to(q.dtype)

    def scales_of(self, layer: int) -> KvScales:
        return self._scales.get(layer, _UNSCALED)

    def attend_stored(
        self,
        layer: int,
        q: torch.Tensor,
        pool: KvPool,
        batch: AttentionBatch,
        rule: ScoreRule,
    ) -> torch.Tensor:
        """As `attend`, where the keys and values of the rows are in the pool already."""
        kv, count, scales = pool.kv(layer), batch.num_decodes, self.scales_of(layer)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if count and batch.cascade is not None and rule.window is None:
            cascade_attention(
                q[:count],
                kv,
                self._cascade_for(q, kv, batch, batch.cascade),
                rule.scale,
                softcap=rule.softcap,
                sinks=rule.sinks,
                k_scale=scales.keys,
                v_scale=scales.values,
                out=out[:count],
            )
        elif count:
            decode_attention(
                q[:count],
                kv,
                batch.tables,
                batch.decode_slots,
                batch.decode_lens,
                self._splits_for(kv, batch, rule.window),
                rule.scale,
                window=rule.window,
                softcap=rule.softcap,
                sinks=rule.sinks,
                k_scale=scales.keys,
                v_scale=scales.values,
                out=out[:count],
            )
        if self._chunks is not None:
            chunks = self._chunks
            prefill_attention(
                q[count:],
                kv,
                batch.tables,
                chunks.slots,
                chunks.starts,
                chunks.contexts,
                self._blocks_for(q, kv, chunks),
                rule.scale,
                window=rule.window,
                softcap=rule.softcap,
                sinks=rule.sinks,
                max_len=chunks.longest,
                k_scale=scales.keys,
                v_scale=scales.values,
                out=out[count:],
            )
        return out

    def _splits_for(self, kv: torch.Tensor, batch: AttentionBatch, window: int | None) -> DecodeSplits:
        key = kv.shape, window
        if key not in self._splits:
            self._splits[key] = decode_splits(batch.decode_lens, kv, batch.tables, window=window)
        return self._splits[key]

    def _cascade_for(
        self, q: torch.Tensor, kv: torch.Tensor, batch: AttentionBatch, shared: SharedPrefixes
    ) -> CascadeStep:
        key = kv.shape, q.shape[1]
        if key not in self._cascades:
            self._cascades[key] = cascade_step(
                shared, batch.decode_lens, kv, batch.tables, batch.decode_slots, q.shape[1]
            )
        return self._cascades[key]

    def _blocks_for(self, q: torch.Tensor, kv: torch.Tensor, chunks: _Chunks) -> QueryBlocks:
        group, dim = q.shape[1] // kv.shape[3], q.shape[2]
        if (group, dim) not in self._blocks:
            tokens = q.shape[0] - chunks.first
            self._blocks[group, dim] = query_blocks(chunks.starts, chunks.contexts, tokens, group, dim)
        return self._blocks[group, dim]


def _uploaded_chunks(batch: AttentionBatch, device: torch.device) -> _Chunks:
    """In one copy. They lie one after another behind the decoding rows."""
    counts = [chunk.count for chunk in batch.chunks]
    contexts = [chunk.context for chunk in batch.chunks]
    slots = [chunk.slot for chunk in batch.chunks]
    packed = torch.from_numpy(np.array([0, *np.cumsum(counts), *contexts, *slots], np.int64))
    if device.type != "cpu":
        packed = packed.pin_memory().to(device, non_blocking=True)
    starts, contexts_there, slots_there = packed.split((len(counts) + 1, len(counts), len(counts)))
    longest = max(context + count for context, count in zip(contexts, counts, strict=True))
    return _Chunks(batch.num_decodes, starts, contexts_there, slots_there, longest)


class FusedSelfAttention:
    """Norms, rotation and KV write in one launch, then attention: what `SteppedSelfAttention` computes."""

    def __init__(self, heads: Heads, backend: TritonAttention) -> None:
        self._heads, self._backend = heads, backend

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
        heads, scales = self._heads, self._backend.scales_of(layer)
        q = rope_kv_write(
            qkv,
            *angles,
            pool.kv(layer),
            batch.write_blocks,
            batch.write_offsets,
            heads.queries,
            heads.keys,
            None if norms is None else norms.query,
            None if norms is None else norms.key,
            heads.eps,
            scales.keys,
            scales.values,
        )
        return self._backend.attend_stored(layer, q, pool, batch, rule).flatten(1)
