"""Attention over paged KV, read in place, on the CPU: source/paged_attention.c."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

LARGEST_HEAD = 256
STORAGE = {torch.float32: 0, torch.bfloat16: 1}

# Rows of a run table: first row, rows, position of the first row, address of the block table.
RUN_FIELDS = 4
RunTable = np.ndarray[tuple[int, int], np.dtype[np.int64]]


def can_attend(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes heads of this size in a pool of this type."""
    fits = 0 < head_dim <= LARGEST_HEAD
    return fits and dtype in STORAGE and (dtype == torch.float32 or head_dim % 2 == 0)


def decode_runs(tables: torch.Tensor, slots: torch.Tensor, lens: torch.Tensor) -> RunTable:
    """Rows 0 .. B - 1 of one token each: slots int64 [B], the row of its block table in `tables`, int64
    [S, W] with dense rows; lens int64 [B] with the row's own token. The tables must outlive the runs."""
    rows = len(lens)
    runs = np.ones((rows, RUN_FIELDS), np.int64)
    runs[:, 0] = np.arange(rows)
    runs[:, 2] = lens.numpy() - 1
    runs[:, 3] = tables.data_ptr() + slots.numpy() * tables.stride(0) * tables.itemsize
    return runs


def chunk_runs(row: int, count: int, context: int, table: torch.Tensor, longest: int) -> RunTable:
    """Rows row .. row + count - 1, which continue a request after `context` tokens, in runs of at most
    `longest` rows that begin at multiples of that from the chunk's first. table: int64, dense; it must
    outlive the runs."""
    starts = np.arange(0, count, longest)
    runs = np.empty((len(starts), RUN_FIELDS), np.int64)
    runs[:, 0] = row + starts
    runs[:, 1] = np.minimum(count - starts, longest)
    runs[:, 2] = context + starts
    runs[:, 3] = table.data_ptr()
    return runs


def longest_run(library: ctypes.CDLL, query_heads: int, kv_heads: int) -> int:
    """Rows of one run at most."""
    return int(library.chiron_max_run(query_heads // kv_heads))


def paged_attention(
    library: ctypes.CDLL,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    write_blocks: torch.Tensor,
    write_offsets: torch.Tensor,
    runs: RunTable,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Store k and v [T, Hkv, D] in the pool, then attend with q [T, Hq, D]: returns [T, Hq, D].

    float32; rows may lie any distance apart, heads are contiguous within a row. kv: one layer's view
    of the pool, [num_blocks, block_size, 2, Hkv, D]. write_blocks, write_offsets: int64 [T]. runs cover
    all rows. Options as `masked_attention` of the torch reference has them.
    """
    rows, query_heads, head_dim = q.shape
    out = torch.empty(rows, query_heads, head_dim, dtype=torch.float32, device="cpu")
    library.chiron_paged_attention(
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        kv.data_ptr(),
        kv.stride(0),
        kv.shape[1],
        kv.shape[3],
        head_dim,
        STORAGE[kv.dtype],
        query_heads,
        write_blocks.data_ptr(),
        write_offsets.data_ptr(),
        rows,
        runs.ctypes.data,
        len(runs),
        scale,
        softcap or 0.0,
        window or 0,
        None if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
    )
    return out
