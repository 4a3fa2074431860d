"""Attention over the paged KV pool: how the rows of a forward pass are described, and the backend
that computes with torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from chiron_kernels.shared_prefixes import SharedPrefixes
from chiron_kernels.torch_attention import chunk_attention, chunk_mask, decode_attention, decode_mask
from chiron_kernels.torch_kv import gather_kv, write_kv

from chiron_engine.model.kv_pool import KvPool


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRule:
    """What a layer makes of products of queries and keys before the softmax.

    scale: what they are multiplied with. window: keys a row sees, itself included; None is all.
    softcap c: c tanh(score / c). sinks: [Hq] extra logits of the softmax, which have no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class ChunkRows:
    """Rows [row_start, row_start + count) continue the request of `slot`, whose first `context` tokens
    have their KV in the pool."""

    row_start: int
    count: int
    context: int
    slot: int


@dataclass(slots=True, eq=False)
class AttentionBatch:
    """The packed rows of one forward pass: `num_decodes` rows of one token each, then the chunks'
    rows one after another.

    tables: int64 [slots, W] block ids, the block table of every slot; nothing is said of what is past a
    request's last block. decode_slots: int64 [num_decodes]. decode_lens: int64 [num_decodes], the KV
    length a row attends to, its own token included. write_blocks, write_offsets: int64 [T], where each
    row's keys and values go. cascade: decoding rows whose requests begin with the same blocks, which a
    backend may read once for all of them; None where it is not worth it.
    """

    num_decodes: int
    tables: torch.Tensor
    decode_slots: torch.Tensor
    decode_lens: torch.Tensor
    max_decode_len: int
    chunks: list[ChunkRows]
    write_blocks: torch.Tensor
    write_offsets: torch.Tensor
    cascade: SharedPrefixes | None = None

    def chunk_table(self, chunk: ChunkRows, block_size: int) -> torch.Tensor:
        """The blocks that hold a chunk and what is before it, int64, a view."""
        return self.tables[chunk.slot, : -(-(chunk.context + chunk.count) // block_size)]


class AttentionBackend(Protocol):
    """Stores and reads the KV of the rows of one forward pass."""

    def begin(self, batch: AttentionBatch, pool: KvPool) -> None:
        """Start a forward pass: forget what was derived for the last one."""
        ...

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
        """Write k, v [T, Hkv, D] to the pool, then attend with q [T, Hq, D]. Returns [T, Hq, D]."""
        ...


@dataclass(slots=True, eq=False)
class _DecodeGroup:
    """Decoding rows of similar length that are gathered together.

    rows: None is all of them. tables: int64 [B * W] of block ids, flat. mask: [B, 1, 1, L].
    stale: int64 indices of gathered tokens past a row's end, which may hold anything.
    """

    rows: torch.Tensor | None
    size: int
    tables: torch.Tensor
    mask: torch.Tensor
    stale: torch.Tensor


@dataclass(slots=True, eq=False)
class _Derived:
    """What all layers with the same window share in one forward pass."""

    decodes: list[_DecodeGroup] = field(default_factory=list)
    chunk_masks: list[torch.Tensor | None] = field(default_factory=list)


class TorchAttention:
    """The reference backend: one gather per layer for all decodes of similar length, then the
    fused attention of torch; one call per chunk."""

    def __init__(self) -> None:
        self._derived: dict[int | None, _Derived] = {}
        self._scratch: torch.Tensor | None = None

    def begin(self, batch: AttentionBatch, pool: KvPool) -> None:
        self._derived.clear()

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
        kv = pool.kv(layer)
        write_kv(kv, k, v, batch.write_blocks, batch.write_offsets)
        derived = self._derived.get(rule.window)
        if derived is None:
            derived = self._derived[rule.window] = _derive(batch, pool, rule.window, q.dtype)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in derived.decodes:
            self._decode(group, q, kv, out, batch.num_decodes, rule)
        for chunk, mask in zip(batch.chunks, derived.chunk_masks, strict=True):
            rows = slice(chunk.row_start, chunk.row_start + chunk.count)
            keys, values = k[rows], v[rows]
            if chunk.context:
                past = gather_kv(kv, batch.chunk_table(chunk, pool.block_size))[: chunk.context + chunk.count]
                keys, values = past[:, 0], past[:, 1]
            out[rows] = chunk_attention(q[rows], keys, values, mask, rule.scale, rule.softcap, rule.sinks)
        return out

    def _decode(
        self,
        group: _DecodeGroup,
        q: torch.Tensor,
        kv: torch.Tensor,
        out: torch.Tensor,
        num_decodes: int,
        rule: ScoreRule,
    ) -> None:
        gathered = gather_kv(kv, group.tables, self._scratch_for(group.tables.numel(), kv))
        # A hidden key weighs nothing, but nothing times NaN is NaN: what another request left in
        # a recycled block must not reach this one.
        gathered.index_fill_(0, group.stale, 0)
        gathered = gathered.view(group.size, -1, *gathered.shape[1:])
        queries = q[:num_decodes] if group.rows is None else q[group.rows]
        result = decode_attention(queries, gathered, group.mask, rule.scale, rule.softcap, rule.sinks)
        if group.rows is None:
            out[:num_decodes] = result
        else:
            out[group.rows] = result

    def _scratch_for(self, blocks: int, kv: torch.Tensor) -> torch.Tensor:
        """One gather buffer for all layers: fresh memory for each costs more than the gather."""
        size = blocks * kv[0].numel()
        scratch = self._scratch
        if scratch is None or scratch.numel() < size or scratch.dtype != kv.dtype:
            scratch = self._scratch = torch.empty(size, dtype=kv.dtype, device=kv.device)
        return scratch


def _derive(batch: AttentionBatch, pool: KvPool, window: int | None, dtype: torch.dtype) -> _Derived:
    derived = _Derived()
    if batch.num_decodes:
        derived.decodes = _decode_groups(batch, pool.block_size, window, dtype)
    for chunk in batch.chunks:
        plain = chunk.context == 0 and (window is None or window >= chunk.count)
        mask = None
        if not plain:
            mask = chunk_mask(chunk.count, chunk.context, window, dtype, pool.device)
        derived.chunk_masks.append(mask)
    return derived


def _decode_groups(
    batch: AttentionBatch, block_size: int, window: int | None, dtype: torch.dtype
) -> list[_DecodeGroup]:
    """Rows whose gathered length differs by less than a factor of two go together, so that one
    long request does not make every other row gather its length."""
    lens = batch.decode_lens
    first_block = torch.zeros_like(lens)
    if window is not None:
        first_block = (lens - window).clamp_(min=0) // block_size
    blocks = (lens + block_size - 1) // block_size - first_block
    counts = blocks.tolist()
    groups = []
    for rows in _similar_rows(counts):
        index = None if len(rows) == len(counts) else torch.tensor(rows, device=lens.device)
        width = max(counts[row] for row in rows)
        groups.append(_decode_group(batch, index, width, first_block, block_size, window, dtype))
    return groups


def _similar_rows(counts: list[int]) -> list[list[int]]:
    """Row numbers in groups, in each of which the largest count is under twice the smallest."""
    longest = max(counts)
    if 2 * min(counts) > longest or longest * len(counts) <= 64:
        return [list(range(len(counts)))]
    by_size: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        by_size.setdefault(count.bit_length(), []).append(row)
    return list(by_size.values())


def _decode_group(
    batch: AttentionBatch,
    rows: torch.Tensor | None,
    width: int,
    first_block: torch.Tensor,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> _DecodeGroup:
    slots, lens = batch.decode_slots, batch.decode_lens
    if rows is not None:
        slots, lens, first_block = slots[rows], lens[rows], first_block[rows]
    last_block = (lens - 1) // block_size
    columns = first_block[:, None] + torch.arange(width, device=lens.device)
    # Past a row's last block read that block again: no row reads a block that is not its own.
    tables = batch.tables[slots[:, None], columns.clamp(max=last_block[:, None])]
    first = first_block * block_size
    mask = decode_mask(lens, first, width * block_size, window, dtype)
    stale = (first[:, None] + torch.arange(width * block_size, device=lens.device)) >= lens[:, None]
    return _DecodeGroup(
        rows=rows,
        size=lens.numel(),
        tables=tables.flatten(),
        mask=mask,
        stale=stale.flatten().nonzero().flatten(),
    )
