"""What kernels that read the paged keys and values ask of them.

One layer of the pool is a view [num_blocks, block_size, 2, Hkv, D], keys at 0 and values at 1 of the third
dimension. A block holds all layers one after another, so blocks lie far apart, while inside the layer's part
of a block everything is dense:

    block 0: | layer 0 | layer 1 | ... |  block 1: | layer 0 | ...
             /         \\
             token 0: keys [Hkv, D], values [Hkv, D];  token 1: ...
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from chiron_kernels.gpu.checks import FLOATS, check_dtype, check_last_dense, check_shape

LARGEST_HEAD = 256
"""Of these kernels: the sums of larger ones, which are rare, would need other tiles."""
FEWEST_COLUMNS = 16
"""Of a head in a kernel: a matrix instruction adds up 16 products at once. Smaller heads are filled up with
zeros."""

EIGHT_BITS = torch.float8_e4m3fn
LEAST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**126
"""Of keys or values of 8 bits: the reciprocal, too, is a normal float32."""

STORED = (*FLOATS, EIGHT_BITS)


def check_kv(kv: torch.Tensor, dtypes: Collection[torch.dtype] = FLOATS) -> None:
    """A layer of the pool, as above."""
    check_shape("kv", kv, (None, None, 2, None, None))
    check_dtype("kv", kv, dtypes)
    blocks, block_size, _, kv_heads, head_dim = kv.shape
    if blocks < 1 or kv_heads < 1:
        raise ValueError(f"kv is {list(kv.shape)}; it must have a block and a head at least")
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"kv has blocks of {block_size} tokens; they must be of a power of two")
    if head_dim % 2 or not 0 < head_dim <= LARGEST_HEAD:
        raise ValueError(f"kv has heads of {head_dim}; they must be even and up to {LARGEST_HEAD}")
    token = 2 * kv_heads * head_dim
    dense = (token, kv_heads * head_dim, head_dim, 1)
    # Of a dimension of one, the stride does not matter.
    inside = zip(kv.shape[1:], kv.stride()[1:], dense, strict=True)
    if any(size > 1 and had != wanted for size, had, wanted in inside) or kv.stride(0) < block_size * token:
        raise ValueError(
            f"kv has strides {list(kv.stride())}; they must be {[block_size * token, *dense]}, the first "
            "that or more"
        )


def check_tables(tables: torch.Tensor) -> None:
    """tables: int64 [any, W], block ids."""
    check_shape("tables", tables, (None, None))
    check_dtype("tables", tables, (torch.int64,))
    check_last_dense("tables", tables)
    if tables.shape[1] < 1:
        raise ValueError(f"tables is {list(tables.shape)}; its rows must hold a block at least")
