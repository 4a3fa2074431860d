"""Keys and values of new tokens, written into one layer of the paged pool.

One layer of the pool, `kv` [N, block_size, 2, Hkv, D], is a strided view: a block holds the tokens of all
layers, so blocks are far apart, and within a block everything is dense:

    block  | token 0                    | token 1 ...
           | keys: Hkv x D | values: Hkv x D |

so that what a token has in a layer is one piece of 2 Hkv D elements. The work is cut into slots: a slot is
the key and the value of one head of one token. A program has as many slots as give each of its threads two
loads of 16 bytes, one of a key and one of a value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.checks import FLOATS, check_device, check_dtype, check_last_dense, check_shape
from chiron_kernels.gpu.eight_bits import check_target, inverse_scales, to_stored
from chiron_kernels.gpu.launch import Launch, power_of_two_from
from chiron_kernels.gpu.paged_kv import EIGHT_BITS

NUM_WARPS = 4
PROGRAM_BYTES = NUM_WARPS * 32 * 2 * 16
"""What the threads of a program read with two loads of 16 bytes each. That is enough in flight: 1024
threads, half of what a multiprocessor of an H100 holds, have 32 KiB under way, and 132 of these 4 MiB, which
is more than its memory hands over in a microsecond."""
MOST_SLOTS = 2**30
"""Slots are counted in 32 bits, and up to a program past the last."""


@triton.jit
def token_start(kv, block, offset, block_stride, KV_HEADS: tl.constexpr, DIM: tl.constexpr):
    """Where tokens begin in a layer of the pool. block, offset: int64, as blocks lie far apart."""
    return kv + block * block_stride + offset * (2 * KV_HEADS * DIM)


@triton.jit(do_not_specialize=["rows"])
def _kv_write(
    k,  # [T, KV_HEADS, DIM]
    v,  # [T, KV_HEADS, DIM]
    kv,  # [N, block_size, 2, KV_HEADS, DIM] out
    blocks,  # int64 [T]
    offsets,  # int64 [T]
    rows,  # T
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    block_stride,  # elements from a block of the pool to the next
    k_inverse,  # of the scale of the keys; not looked at but for a pool of 8 bits, nor is the next
    v_inverse,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,  # the power of two from DIM up
    SLOTS: tl.constexpr,  # of a program
):
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)[:, None]
    row = (slot // KV_HEADS).to(tl.int64)
    head = slot % KV_HEADS
    there = slot < rows * KV_HEADS
    column = tl.arange(0, TILE)[None, :]
    held = column < DIM
    key = tl.load(k + row * k_row_stride + head * k_head_stride + column, mask=there & held)
    value = tl.load(v + row * v_row_stride + head * v_head_stride + column, mask=there & held)
    # Where they go is asked for last: no load waits for another. For that, padding is read too.
    block = tl.load(blocks + row, mask=there, other=-1)
    offset = tl.load(offsets + row, mask=there, other=0)
    target = token_start(kv, block, offset, block_stride, KV_HEADS, DIM) + head * DIM + column
    written = (block >= 0) & held
    dtype: tl.constexpr = kv.dtype.element_ty
    tl.store(target, to_stored(key, k_inverse, dtype), mask=written)
    tl.store(target + KV_HEADS * DIM, to_stored(value, v_inverse, dtype), mask=written)


def check_pool(name: str, kv: torch.Tensor, kv_heads: int, dim: int, like: torch.Tensor) -> None:
    """kv: a layer of the pool with so many heads of so many elements, where `like` is and in its dtype, or in
    8 bits."""
    check_shape(name, kv, (None, None, 2, kv_heads, dim))
    check_dtype(name, kv, (like.dtype, EIGHT_BITS))
    check_target(kv)
    dense = (2 * kv_heads * dim, kv_heads * dim, dim, 1)
    if kv.stride()[1:] != dense:
        raise ValueError(f"{name} has strides {list(kv.stride())}; within a block they must be {list(dense)}")
    check_device(like, **{name: kv})


def check_places(like: torch.Tensor, write_blocks: torch.Tensor, write_offsets: torch.Tensor) -> None:
    """write_blocks, write_offsets: int64 [T] for the T rows of `like`. What they hold is on the device, and
    not looked at."""
    for name, places in (("write_blocks", write_blocks), ("write_offsets", write_offsets)):
        check_shape(name, places, (like.shape[0],))
        check_dtype(name, places, (torch.int64,))
        check_last_dense(name, places)
    check_device(like, write_blocks=write_blocks, write_offsets=write_offsets)


def check_slots(rows: int, heads: int) -> None:
    """Of so many rows with so many heads."""
    if rows * heads > MOST_SLOTS:
        raise ValueError(f"{rows} rows of {heads} heads are more than {MOST_SLOTS} in all")


def kv_write_launch(
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    write_blocks: torch.Tensor,
    write_offsets: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Launch:
    """As `kv_write`."""
    check_shape("k", k, (None, None, None))
    check_dtype("k", k, FLOATS)
    rows, kv_heads, dim = k.shape
    check_shape("v", v, (rows, kv_heads, dim))
    check_dtype("v", v, (k.dtype,))
    check_last_dense("k", k)
    check_last_dense("v", v)
    check_device(k, v=v)
    check_pool("kv", kv, kv_heads, dim, k)
    check_places(k, write_blocks, write_offsets)
    check_slots(rows, kv_heads)
    k_inverse, v_inverse = inverse_scales(kv, k_scale, v_scale)
    tile = power_of_two_from(dim)
    slots = max(PROGRAM_BYTES // (2 * tile * k.dtype.itemsize), 1)
    return Launch(
        _kv_write,
        (-(-rows * kv_heads // slots),),
        {
            "k": k,
            "v": v,
            "kv": kv,
            "blocks": write_blocks,
            "offsets": write_offsets,
            "rows": rows,
            "k_row_stride": k.stride(0),
            "k_head_stride": k.stride(1),
            "v_row_stride": v.stride(0),
            "v_head_stride": v.stride(1),
            "block_stride": kv.stride(0),
            "k_inverse": k_inverse,
            "v_inverse": v_inverse,
            "KV_HEADS": kv_heads,
            "DIM": dim,
            "TILE": tile,
            "SLOTS": slots,
        },
        num_warps=NUM_WARPS,
        num_stages=1,
    )


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

    k, v: [T, Hkv, D], float16, bfloat16 or float32, elements of a head dense, any strides else. kv: one layer
    of the pool, [N, block_size, 2, Hkv, D] of the same dtype or float8_e4m3fn, dense within a block.
    write_blocks, write_offsets: int64 [T]; blocks under N and offsets under block_size, no place twice, which
    is not checked. k_scale, v_scale: what keys and values are divided by for a pool of 8 bits, see
    `eight_bits`. Raises ValueError for what does not fit."""
    kv_write_launch(k, v, kv, write_blocks, write_offsets, k_scale, v_scale).run()
