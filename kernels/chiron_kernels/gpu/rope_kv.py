"""From the packed product of a decoder layer to what attention reads, in one pass: queries and keys are
normalised (where the model does) and rotated, keys and values go into the paged pool.

A row of `qkv` is one token:

    | q: HEADS x DIM | k: KV_HEADS x DIM | v: KV_HEADS x DIM |

The work is cut into slots: a slot is one head of one token. Programs come in three kinds, for queries, for
keys and for values, so that all of them have the same little to do. Heads are held in parts: element i of the
low part turns together with element i of the high one, and one thread has both; what does not turn comes in
further parts of the same size.

    | low: ROTARY / 2 | high: ROTARY / 2 | rest: DIM - ROTARY, part by part |

Packed rows are read once and their parts written once; the angles, which all heads of a token share, come
from the cache but for the first time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.checks import (
    FLOATS,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_dense,
    check_shape,
)
from chiron_kernels.gpu.eight_bits import inverse_scales, to_stored
from chiron_kernels.gpu.kv_write import (
    NUM_WARPS,
    PROGRAM_BYTES,
    check_places,
    check_pool,
    check_slots,
    token_start,
)
from chiron_kernels.gpu.launch import Launch, power_of_two_from

SMALLEST_PART_BYTES = 16
"""One load of a thread, however little of a head turns."""


@triton.jit
def _move_heads(
    program,  # of those of this kind of head
    source,  # the heads in the packed rows
    target,  # dense [T, COUNT, DIM]; CACHED: a layer of the pool, where heads of this kind begin
    cos,  # [T, ROTARY]; not read unless TURNS, nor is sin
    sin,
    weight,  # [DIM]; not read unless NORM
    blocks,  # int64 [T]; not read unless CACHED, nor is offsets
    offsets,
    rows,
    row_stride,
    block_stride,
    eps,
    inverse_scale,  # not looked at but for a pool of 8 bits
    TURNS: tl.constexpr,
    NORM: tl.constexpr,
    CACHED: tl.constexpr,
    COUNT: tl.constexpr,  # heads of this kind in a row
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PART: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The heads of one program, from the packed rows to where they belong."""
    HALF: tl.constexpr = ROTARY // 2
    slot = program * SLOTS + tl.arange(0, SLOTS)[:, None]
    column = tl.arange(0, PART)[None, :]
    there = slot < rows * COUNT
    inside = there & (column < HALF)
    row = (slot // COUNT).to(tl.int64)
    head = slot % COUNT
    source += row * row_stride + head * DIM
    low = tl.load(source + column, mask=inside, other=0.0)
    high = tl.load(source + HALF + column, mask=inside, other=0.0)
    if TURNS:
        # The halves of cos are equal and those of sin opposite: one half of each will do.
        turn = row * ROTARY + column
        cosine = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sin + turn + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        gain_low = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        gain_high = tl.load(weight + HALF + column, mask=inside, other=0.0).to(tl.float32)
    written = there
    if CACHED:
        block = tl.load(blocks + row, mask=there, other=-1)
        offset = tl.load(offsets + row, mask=there, other=0)
        target = token_start(target, block, offset, block_stride, COUNT, DIM) + head * DIM
        written = block >= 0
    else:
        target += slot.to(tl.int64) * DIM
    # All these loads are to be under way together. Left alone, the assembler puts some of them off until
    # others have arrived, to save registers.
    tl.debug_barrier()

    dtype: tl.constexpr = target.dtype.element_ty
    if NORM:
        wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
        squares = wide_low * wide_low + wide_high * wide_high
        for start in tl.static_range(ROTARY, DIM, PART):
            beyond = start + column
            rest = tl.load(source + beyond, mask=there & (beyond < DIM), other=0.0).to(tl.float32)
            squares += rest * rest
        scale = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / DIM + eps)
        gain_low *= scale
        gain_high *= scale
    for start in tl.static_range(ROTARY, DIM, PART):
        beyond = start + column
        held = beyond < DIM
        rest = tl.load(source + beyond, mask=there & held, other=0.0)
        if NORM:
            gain = tl.load(weight + beyond, mask=there & held, other=0.0).to(tl.float32)
            rest = rest.to(tl.float32) * gain * scale
        tl.store(target + beyond, to_stored(rest, inverse_scale, dtype), mask=written & held)
    if TURNS:
        x, y = low.to(tl.float32), high.to(tl.float32)
        if NORM:
            x *= gain_low
            y *= gain_high
        low = x * cosine - y * sine
        high = y * cosine + x * sine
    kept = written & (column < HALF)
    tl.store(target + column, to_stored(low, inverse_scale, dtype), mask=kept)
    tl.store(target + HALF + column, to_stored(high, inverse_scale, dtype), mask=kept)


@triton.jit(do_not_specialize=["rows"])
def _rope_kv_write(
    qkv,  # [T, (HEADS + 2 KV_HEADS) DIM]
    cos,  # [T, ROTARY]
    sin,  # [T, ROTARY]
    q_norm,  # [DIM]; not read unless NORM
    k_norm,  # [DIM]; not read unless NORM
    q,  # [T, HEADS, DIM] out, contiguous
    kv,  # [N, block_size, 2, KV_HEADS, DIM] out
    blocks,  # int64 [T]
    offsets,  # int64 [T]
    rows,  # T
    row_stride,  # elements from a row of qkv to the next
    block_stride,  # elements from a block of the pool to the next
    eps,
    k_inverse,  # of the scale of the keys; not looked at but for a pool of 8 bits, nor is the next
    v_inverse,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PART: tl.constexpr,  # the power of two from ROTARY / 2 up
    SLOTS: tl.constexpr,  # of a program
):
    KEYS: tl.constexpr = HEADS * DIM  # where they begin in a row
    SIZE: tl.constexpr = KV_HEADS * DIM  # of the keys of a token, after which its values come
    program = tl.program_id(0)
    query_programs = tl.cdiv(rows * HEADS, SLOTS)
    key_programs = tl.cdiv(rows * KV_HEADS, SLOTS)
    if program < query_programs:
        _move_heads(
            program, qkv,
            q, cos, sin, q_norm, blocks, offsets, rows, row_stride, block_stride, eps, 1.0,
            True, NORM, False, HEADS, DIM, ROTARY, PART, SLOTS,
        )  # fmt: skip
    elif program < query_programs + key_programs:
        _move_heads(
            program - query_programs, qkv + KEYS,
            kv, cos, sin, k_norm, blocks, offsets, rows, row_stride, block_stride, eps, k_inverse,
            True, NORM, True, KV_HEADS, DIM, ROTARY, PART, SLOTS,
        )  # fmt: skip
    else:
        _move_heads(
            program - query_programs - key_programs, qkv + KEYS + SIZE,
            kv + SIZE, cos, sin, k_norm, blocks, offsets, rows, row_stride, block_stride, eps, v_inverse,
            False, False, True, KV_HEADS, DIM, ROTARY, PART, SLOTS,
        )  # fmt: skip


def _check_heads(qkv: torch.Tensor, heads: int, kv_heads: int) -> int:
    """Elements of a head."""
    check_shape("qkv", qkv, (None, None))
    check_dtype("qkv", qkv, FLOATS)
    check_last_dense("qkv", qkv)
    if heads < 1 or kv_heads < 1:
        raise ValueError(f"heads is {heads} and kv_heads {kv_heads}; each must be 1 or more")
    packed = heads + 2 * kv_heads
    width = qkv.shape[1]
    if width == 0 or width % packed:
        raise ValueError(f"qkv has rows of {width}; they must be of {packed} heads of the same size")
    check_slots(qkv.shape[0], max(heads, kv_heads))
    return width // packed


def _check_angles(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int) -> int:
    """Elements of a head that turn."""
    check_shape("cos", cos, (qkv.shape[0], 1, None))
    rotary = cos.shape[2]
    if rotary % 2 or not 0 < rotary <= dim:
        raise ValueError(f"cos has rows of {rotary}; they must be of an even number from 2 to {dim}")
    check_shape("sin", sin, tuple(cos.shape))
    for name, angles in (("cos", cos), ("sin", sin)):
        check_dtype(name, angles, (qkv.dtype,))
        check_contiguous(name, angles)
    check_device(qkv, cos=cos, sin=sin)
    return rotary


def _check_norms(
    qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, dim: int
) -> None:
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm are given one without the other; give both or none")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_shape(name, weight, (dim,))
            check_dtype(name, weight, FLOATS)
            check_contiguous(name, weight)
    check_device(qkv, q_norm=q_norm, k_norm=k_norm)


def rope_kv_write_launch(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    write_blocks: torch.Tensor,
    write_offsets: torch.Tensor,
    heads: int,
    kv_heads: int,
    q: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Launch:
    """q: [T, heads, D] contiguous, written. Otherwise as `rope_kv_write`."""
    dim = _check_heads(qkv, heads, kv_heads)
    rotary = _check_angles(qkv, cos, sin, dim)
    _check_norms(qkv, q_norm, k_norm, dim)
    check_pool("kv", kv, kv_heads, dim, qkv)
    check_places(qkv, write_blocks, write_offsets)
    k_inverse, v_inverse = inverse_scales(kv, k_scale, v_scale)
    rows = qkv.shape[0]
    check_shape("q", q, (rows, heads, dim))
    check_dtype("q", q, (qkv.dtype,))
    check_contiguous("q", q)
    check_device(qkv, q=q)
    itemsize = qkv.dtype.itemsize
    part = max(power_of_two_from(rotary // 2), SMALLEST_PART_BYTES // itemsize)
    # 16 bytes a thread of the low part, and 16 of the high one.
    slots = max(PROGRAM_BYTES // (2 * part * itemsize), 1)
    return Launch(
        _rope_kv_write,
        (-(-rows * heads // slots) + 2 * -(-rows * kv_heads // slots),),
        {
            "qkv": qkv,
            "cos": cos,
            "sin": sin,
            "q_norm": qkv if q_norm is None else q_norm,
            "k_norm": qkv if k_norm is None else k_norm,
            "q": q,
            "kv": kv,
            "blocks": write_blocks,
            "offsets": write_offsets,
            "rows": rows,
            "row_stride": qkv.stride(0),
            "block_stride": kv.stride(0),
            "eps": eps,
            "k_inverse": k_inverse,
            "v_inverse": v_inverse,
            "NORM": q_norm is not None,
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "DIM": dim,
            "ROTARY": rotary,
            "PART": part,
            "SLOTS": slots,
        },
        num_warps=NUM_WARPS,
        num_stages=1,
    )


def rope_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    write_blocks: torch.Tensor,
    write_offsets: torch.Tensor,
    heads: int,
    kv_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """The rotated queries [T, heads, D]; the rotated keys and the values go to
    kv[write_blocks[t], write_offsets[t]], of row t, unless its block is negative.

    qkv: [T, (heads + 2 kv_heads) D], float16, bfloat16 or float32; rows may lie apart.
    cos, sin: [T, 1, R] contiguous, of the same dtype. x of a head becomes x cos + roll(x, R / 2) sin, in
    its first R elements, R even and up to D: sin carries the sign of the rotation, so the halves of cos must
    be equal and those of sin opposite (Su et al. 2021, arXiv:2104.09864, with halves in place of neighbours).
    kv: one layer of the pool, [N, block_size, 2, kv_heads, D] of the same dtype or float8_e4m3fn, dense
    within a block.
    write_blocks, write_offsets: int64 [T]; blocks under N and offsets under block_size, no place twice, which
    is not checked.
    q_norm, k_norm: both or none, [D]: before they turn, each head of the queries and of the keys is divided
    by sqrt(mean(x^2) + eps) and multiplied by these.
    k_scale, v_scale: what keys and values are divided by for a pool of 8 bits, see `eight_bits`.
    All arithmetic is in float32 and rounded once. Raises ValueError for what does not fit."""
    dim = _check_heads(qkv, heads, kv_heads)
    q = qkv.new_empty(qkv.shape[0], heads, dim)
    rope_kv_write_launch(
        qkv,
        cos,
        sin,
        kv,
        write_blocks,
        write_offsets,
        heads,
        kv_heads,
        q,
        q_norm,
        k_norm,
        eps,
        k_scale,
        v_scale,
    ).run()
    return q
