"""Paged KV in plain torch: writing tokens into blocks and gathering blocks. The reference for the
Triton kernels, and what runs on the CPU.

`kv` is one layer's view of the pool, [num_blocks, block_size, 2, Hkv, D]: keys at 0, values at 1.
"""

from __future__ import annotations

import torch


def write_kv(
    kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor
) -> None:
    """Store row t of k and v [T, Hkv, D] at kv[blocks[t], offsets[t]]. Indices are int64 [T]."""
    kv.index_put_((blocks, offsets), torch.stack((k, v), dim=1))


def gather_kv(kv: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tokens of `blocks` (int64 [N]) one after another: [N * block_size, 2, Hkv, D].

    out: a flat scratch of the same dtype and device, at least that large; it then backs the result.
    """
    rows = kv.flatten(1)
    if out is None:
        gathered = rows.index_select(0, blocks)
    else:
        gathered = out[: blocks.numel() * rows.shape[1]].view(blocks.numel(), rows.shape[1])
        torch.index_select(rows, 0, blocks, out=gathered)
    return gathered.view(-1, *kv.shape[2:])
