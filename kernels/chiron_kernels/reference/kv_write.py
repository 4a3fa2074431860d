"""Keys and values of new tokens into the paged pool."""

from __future__ import annotations

import torch


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    write_blocks: torch.Tensor,
    write_offsets: torch.Tensor,
) -> None:
    """Row t of k and v goes to kv[write_blocks[t], write_offsets[t]]; not if its block is negative.

    k, v: [T, Hkv, D]. kv: [N, block_size, 2, Hkv, D], keys at 0, values at 1. write_blocks, write_offsets:
    int64 [T]."""
    written = write_blocks >= 0
    places = write_blocks[written], write_offsets[written]
    kv.index_put_(places, torch.stack((k, v), dim=1)[written])
