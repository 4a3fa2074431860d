"""Checks of what decode attention is called with."""

from __future__ import annotations

import torch

from chiron_kernels.gpu.checks import (
    FLOATS,
    HALVES,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_dense,
    check_shape,
)
from chiron_kernels.gpu.decode_plan import DecodeSplits, tile_keys
from chiron_kernels.gpu.paged_kv import EIGHT_BITS, STORED, check_kv, check_tables


def check_decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    table_rows: torch.Tensor,
    lens: torch.Tensor,
    splits: DecodeSplits,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    query_len: int,
    lse: torch.Tensor | None,
) -> None:
    """Raises ValueError if an argument of `decode_attention` does not fit the others."""
    check_kv(kv, STORED)
    check_tables(tables)
    _check_splits(splits, kv, tables, window, query_len)
    batch = splits.requests.shape[1]
    _check_queries(q, kv, batch * query_len)
    check_shape("table_rows", table_rows, (batch,))
    check_shape("lens", lens, (batch,))
    for name, indices in (("table_rows", table_rows), ("lens", lens)):
        check_dtype(name, indices, (torch.int64,))
        check_last_dense(name, indices)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0, or None")
    if sinks is not None:
        check_shape("sinks", sinks, (q.shape[1],))
        check_dtype("sinks", sinks, FLOATS)
        check_contiguous("sinks", sinks)
    if lse is not None:
        check_shape("lse", lse, tuple(q.shape[:2]))
        check_dtype("lse", lse, (torch.float32,))
        check_contiguous("lse", lse)
    check_device(
        kv, q=q, tables=tables, table_rows=table_rows, lens=lens, splits=splits.work, sinks=sinks, lse=lse
    )


def _check_splits(
    splits: DecodeSplits, kv: torch.Tensor, tables: torch.Tensor, window: int | None, query_len: int
) -> None:
    """splits were made for this geometry: for another one, tiles would lie beyond the tables."""
    _, block_size, _, kv_heads, head_dim = kv.shape
    for what, had, wanted in (
        ("query_len", splits.query_len, query_len),
        ("window", splits.window, window),
        ("kv_heads", splits.kv_heads, kv_heads),
        ("tiles", splits.tile, tile_keys(block_size, head_dim, kv.dtype)),
        ("table_keys", splits.table_keys, tables.shape[1] * block_size),
    ):
        if had != wanted:
            raise ValueError(f"splits were made for {what} {had}; they must be for {wanted}")


def _check_queries(q: torch.Tensor, kv: torch.Tensor, rows: int) -> None:
    kv_heads, head_dim = kv.shape[3:]
    check_shape("q", q, (rows, None, head_dim))
    check_dtype("q", q, HALVES if kv.dtype == EIGHT_BITS else (kv.dtype,))
    check_last_dense("q", q)
    heads = q.shape[1]
    if heads < 1 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads; they must be a multiple of the {kv_heads} of kv")
    if heads > 1 and q.stride(1) != head_dim:
        raise ValueError(f"q has heads {q.stride(1)} apart; they must be {head_dim} apart")


def check_results(
    q: torch.Tensor,
    splits: DecodeSplits,
    out: torch.Tensor,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
) -> None:
    """What the kernel writes, for a q that was checked."""
    rows, heads, head_dim = q.shape
    packed = heads // splits.kv_heads * splits.query_len
    check_shape("out", out, (rows, heads, head_dim))
    check_dtype("out", out, (q.dtype,))
    check_shape("partial", partial, (splits.capacity, splits.kv_heads, packed, head_dim))
    check_shape("partial_lse", partial_lse, (splits.capacity, splits.kv_heads, packed))
    for name, result in (("out", out), ("partial", partial), ("partial_lse", partial_lse)):
        check_contiguous(name, result)
    check_dtype("partial", partial, (torch.float32,))
    check_dtype("partial_lse", partial_lse, (torch.float32,))
    check_device(q, out=out, partial=partial, partial_lse=partial_lse)
