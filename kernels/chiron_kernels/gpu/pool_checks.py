"""Checks of a layer of the paged pool, kv [num_blocks, block_size, 2, kv_heads, head_dim].

block      |<- block_size tokens ->|      the blocks of a layer lie stride(0) elements apart, which is
token      |<- keys -><- values ->|       a block of all layers; within a block all is dense
keys       |<- head 0 -><- head 1 -> ...|
"""

from __future__ import annotations

import torch

from chiron_kernels.gpu.checks import FLOATS, check_dtype, check_shape

LARGEST_HEAD = 256
EIGHT_BITS = torch.float8_e4m3fn


def check_pool(kv: torch.Tensor) -> None:
    check_shape("kv", kv, (None, None, 2, None, None))
    check_dtype("kv", kv, (*FLOATS, EIGHT_BITS))
    blocks, block_size, _, kv_heads, head_dim = kv.shape
    if blocks < 1 or kv_heads < 1:
        raise ValueError(f"kv is {list(kv.shape)}; it must have a block and a head at least")
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"kv has blocks of {block_size} tokens; they must be of a power of two")
    if head_dim % 2 or not 0 < head_dim <= LARGEST_HEAD:
        raise ValueError(f"kv has heads of {head_dim}; they must be even and up to {LARGEST_HEAD}")
    dense = torch.empty(kv.shape[1:], device="meta").stride()
    if any(
        size > 1 and had != wanted
        for size, had, wanted in zip(kv.shape[1:], kv.stride()[1:], dense, strict=True)
    ):
        raise ValueError(f"kv has strides {list(kv.stride())}; within a block they must be {list(dense)}")
