"""Keys and values of new tokens into the paged pool."""

from __future__ import annotations

import torch

from chiron_kernels.gpu.paged_kv import EIGHT_BITS


def to_stored(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """x as a pool of this dtype holds it. Of 8 bits: multiplied with the reciprocal of its scale in float32,
    no larger than the largest there is, and rounded to nearest even; NaN stays NaN."""
    if dtype != EIGHT_BITS:
        return x.to(dtype)
    largest = torch.finfo(dtype).max
    return (x.float() * (1 / scale)).clamp(-largest, largest).to(dtype)


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    write_blocks: torch.Tensor,
    write_offsets: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Row t of k and v goes to kv[write_blocks[t], write_offsets[t]]; not if its block is negative.

    k, v: [T, Hkv, D]. kv: [N, block_size, 2, Hkv, D], keys at 0, values at 1. write_blocks, write_offsets:
    int64 [T]. k_scale, v_scale: for a pool of 8 bits, see `to_stored`."""
    written = write_blocks >= 0
    places = write_blocks[written], write_offsets[written]
    stored = torch.stack((to_stored(k, k_scale, kv.dtype), to_stored(v, v_scale, kv.dtype)), dim=1)
    kv.index_put_(places, stored[written])
