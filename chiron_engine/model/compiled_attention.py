"""The attention backend of compiled CPU kernels: the pool is read in place."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from chiron_kernels.cpu.paged_attention import (
    RunTable,
    can_attend,
    chunk_runs,
    decode_runs,
    longest_run,
    paged_attention,
)

from chiron_engine.model.attention import AttentionBatch, ScoreRule, TorchAttention
from chiron_engine.model.kv_pool import KvPool


class CompiledAttention:
    """Attends in float32 over a float32 or bfloat16 pool. What a row gets depends on its request alone,
    bit for bit: not on its batch, nor on how its prompt was cut. Heads the kernels do not take, which
    are those over 256, go through torch."""

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._kernels = kernels
        self._torch = TorchAttention()
        self._runs: dict[int, RunTable] = {}

    def begin(self, batch: AttentionBatch, pool: KvPool) -> None:
        self._runs.clear()
        self._torch.begin(batch, pool)

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
        if not can_attend(q.shape[2], pool.dtype):
            return self._torch.attend(layer, q, k, v, pool, batch, rule)
        longest = longest_run(self._kernels, q.shape[1], k.shape[1])
        runs = self._runs.get(longest)
        if runs is None:
            runs = self._runs[longest] = _runs_of(batch, longest)
        out = paged_attention(
            self._kernels,
            _packed_heads(q),
            _packed_heads(k),
            _packed_heads(v),
            pool.kv(layer),
            batch.write_blocks,
            batch.write_offsets,
            runs,
            rule.scale,
            rule.window,
            rule.softcap,
            None if rule.sinks is None else rule.sinks.float().contiguous(),
        )
        return out.to(q.dtype)


def _packed_heads(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] in float32, a row's heads one after another as the kernels read them."""
    x = x.float()
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _runs_of(batch: AttentionBatch, longest: int) -> RunTable:
    runs = [
        chunk_runs(chunk.row_start, chunk.count, chunk.context, batch.tables[chunk.slot], longest)
        for chunk in batch.chunks
    ]
    if batch.num_decodes:
        runs.append(decode_runs(batch.tables, batch.decode_slots, batch.decode_lens))
    return np.concatenate(runs)
