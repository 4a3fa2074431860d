"""Attention of the newest tokens over the paged pool."""

from __future__ import annotations

import math
from typing import Any

import torch


def decode_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    table_rows: torch.Tensor,
    lens: torch.Tensor,
    splits: Any,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    query_len: int = 1,
    lse: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """softmax(scale q k^T) v of the newest query_len tokens of each request, computed in float64 and rounded
    to q's dtype: [B * query_len, Hq, D].

    As `chiron_kernels.gpu.decode_attention.decode_attention` has it; splits count for nothing here.
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if lse is not None:
        lse.fill_(-math.inf)
    for request, (row, length) in enumerate(zip(table_rows.tolist(), lens.tolist(), strict=True)):
        keys, values = _gather(kv, tables[row], length, k_scale, v_scale)
        for token in range(query_len):
            position = length - query_len + token
            first = 0 if window is None else max(position + 1 - window, 0)
            if position < 0:
                continue
            target = request * query_len + token
            seen = slice(first, position + 1)
            result, log_sum = _attend(q[target].double(), keys[seen], values[seen], scale, softcap, sinks)
            out[target] = result.to(q.dtype)
            if lse is not None:
                lse[target] = log_sum.float()
    return out


def _gather(
    kv: torch.Tensor, table: torch.Tensor, length: int, k_scale: float, v_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first `length` tokens of a block table, each [length, Hkv, D], float64."""
    block_size = kv.shape[1]
    used = table[: -(-length // block_size)].tolist()
    tokens = torch.cat([kv[block].double() for block in used] or [kv[:0].flatten(0, 1).double()])[:length]
    return tokens[:, 0] * k_scale, tokens[:, 1] * v_scale


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token's [Hq, D] over [L, Hkv, D] keys and values, and the softmax's log-sum [Hq]."""
    group = q.shape[0] // keys.shape[1]
    keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
    scores = torch.einsum("hd,lhd->hl", q, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    log_sum = scores.logsumexp(dim=1)
    if sinks is not None:
        log_sum = torch.logaddexp(log_sum, sinks.double())
    return torch.einsum("hl,lhd->hd", (scores - log_sum[:, None]).exp(), values), log_sum
