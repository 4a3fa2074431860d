"""Reading tiles of keys and values from the paged pool.

How a tile of TILE keys is read, given its entries of the block table (LOADS):

    "descriptor"  TILE <= block_size, from Hopper on: the tile is a box in one block, copied by the tensor
                  memory accelerator, which needs no addresses from the threads
    "block"       TILE <= block_size: one entry, a scalar; addresses are that block's plus constants
    "token"       TILE > block_size: an entry for each key

What lies beyond a request's last key may be NaN, and 0 * NaN is NaN: of the values there, zeros must be made
while reading.

  * By address, keys that are not inside are not read, and are 0.

  * A box cannot end early. The last one is instead moved back so that it ends with the last key. It then
    starts with keys of the tile before, which are not to count twice, or before the block, where the
    accelerator puts zeros. Here are blocks of 8, tiles of 4 and keys up to 5:

        tokens of the block        0 1 2 3 4 5 6 7
        tile before                x x x x
        last tile, moved back          . . x x          . counted with the tile before

    Keys before those that a window lets the queries see are the request's own still, and numbers: they
    share a block with keys that are seen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from chiron_kernels.gpu.launch import HOPPER, target_architecture

DESCRIPTOR_ALIGNMENT = 16
"""Bytes: of a descriptor's address and strides."""


@triton.jit
def load_tile(
    kv,  # the layer's pool, or a descriptor of it
    block,  # block ids: a scalar, or [TILE]
    start,  # the tile's first key; by descriptor, the box's first token in the block
    inside,  # [TILE] keys to be read, the others are 0; by descriptor all are read
    head,
    block_stride,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    LOADS: tl.constexpr,
):
    """Keys and values of one head, [TILE, COLUMNS] each, as the pool has them; columns from D on are 0."""
    if LOADS == "descriptor":
        block = block.to(tl.int32)
        k = kv.load([block, start, head, 0])
        v = kv.load([block, start, KV_HEADS + head, 0])
        return k.reshape(TILE, COLUMNS), v.reshape(TILE, COLUMNS)
    else:
        # Below BLOCK_SIZE: a tile longer than a block starts with one, so that the first term is 0; any other
        # lies within a block, so that the second is 0 to TILE - 1.
        token = start % BLOCK_SIZE + tl.arange(0, TILE) % BLOCK_SIZE
        column = tl.arange(0, COLUMNS)
        row = kv + block * block_stride + token * (2 * KV_HEADS * D) + head * D
        address = row[:, None] + column[None, :]
        mask = inside[:, None]
        if COLUMNS > D:
            mask = mask & (column < D)[None, :]
        k = tl.load(address, mask=mask, other=0.0)
        v = tl.load(address + KV_HEADS * D, mask=mask, other=0.0)
        return k, v


@triton.jit
def inside_tile(start, lowest, length, TILE: tl.constexpr):
    """[TILE] which keys of the tile that starts at key `start` some query sees."""
    key = start + tl.arange(0, TILE)
    return (key >= lowest) & (key < length)


@triton.jit
def look_up(table, start, inside, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, LOADS: tl.constexpr):
    """The block ids of the tile that starts at key `start`: a scalar, or for each key."""
    if LOADS == "token":
        return tl.load(table + (start + tl.arange(0, TILE)) // BLOCK_SIZE, mask=inside, other=0)
    else:
        return tl.load(table + start // BLOCK_SIZE)


def tile_loads(kv: torch.Tensor, tile: int) -> str:
    """How tiles are read: what LOADS stands for, see above."""
    if tile > kv.shape[1]:
        return "token"
    aligned = kv.data_ptr() % DESCRIPTOR_ALIGNMENT == 0 and all(
        stride * kv.itemsize % DESCRIPTOR_ALIGNMENT == 0 for stride in (kv.stride(0), kv.shape[-1])
    )
    return "descriptor" if aligned and target_architecture() >= HOPPER else "block"


def tile_descriptor(kv: torch.Tensor, tile: int, columns: int) -> TensorDescriptor:
    """Boxes of the keys, or the values, of one head for `tile` tokens of a block."""
    blocks, block_size, _, kv_heads, head_dim = kv.shape
    return TensorDescriptor(
        kv,
        shape=[blocks, block_size, 2 * kv_heads, head_dim],
        strides=[kv.stride(0), 2 * kv_heads * head_dim, head_dim, 1],
        block_shape=[1, tile, 1, columns],
    )
