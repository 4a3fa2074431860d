"""Residual addition and root-mean-square norm in one pass over the rows.

A row is read once, kept in registers and written twice: the sum, which the next layer adds to, and the
normalised row. Bytes moved are 2 reads and 2 writes of a row, the least there is; the weight stays in the
cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.checks import FLOATS, check_contiguous, check_device, check_dtype, check_shape
from chiron_kernels.gpu.launch import Launch, power_of_two_from

WIDEST = 16384
"""Elements of a row that still fit the registers of one program."""
WARP_WIDTH = 1024
"""Elements of a row up to which one warp sums it up: 32 of them a thread, and no barrier."""
SHORT_BYTES = 512
"""A row up to this long is one load of 16 bytes for each thread of a warp, or less: several go together."""


@triton.jit(do_not_specialize=["rows"])
def _add_rms_norm(
    x,  # [T, H] contiguous
    delta,  # [T, H] contiguous; not read unless HAS_DELTA
    weight,  # [H]
    total,  # [T, H] out: x + delta
    normed,  # [T, H] out
    rows,  # T
    width,  # H
    eps,
    HAS_DELTA: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    TILE: tl.constexpr,  # the power of two from H up
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, TILE)[None, :]
    inside = (row < rows) & (column < width)
    place = row * width + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    # Read before the sum is known, so that its load is under way meanwhile.
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        # The sum is used as it is stored, so that the norm is that of what the next layer will read.
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / width + eps)
    tl.store(normed + place, (value * scale * gain).to(normed.dtype.element_ty), mask=inside)


def _shape(width: int, itemsize: int) -> tuple[int, int, int]:
    """Rows of a program, elements of its tile along a row, and warps."""
    tile = power_of_two_from(width)
    if tile * itemsize <= SHORT_BYTES:
        num_warps = 4
        return num_warps * SHORT_BYTES // (tile * itemsize), tile, num_warps
    if tile <= WARP_WIDTH:
        return 1, tile, 1
    # Two loads of 8 halves a thread, so that registers hold them along with the weight.
    return 1, tile, tile // 512


def add_rms_norm_launch(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    total: torch.Tensor,
    normed: torch.Tensor,
) -> Launch:
    """total, normed: [T, H], written; total is left alone without delta. Otherwise as `add_rms_norm`."""
    check_shape("x", x, (None, None))
    rows, width = x.shape
    if not 0 < width <= WIDEST:
        raise ValueError(f"x has rows of {width}; they must be of 1 to {WIDEST}")
    check_dtype("x", x, FLOATS)
    check_shape("weight", weight, (width,))
    check_dtype("weight", weight, FLOATS)
    check_contiguous("weight", weight)
    check_contiguous("x", x)
    for name, other in (("delta", delta), ("total", total), ("normed", normed)):
        if other is not None:
            check_shape(name, other, (rows, width))
            check_dtype(name, other, (x.dtype,))
            check_contiguous(name, other)
    check_device(x, delta=delta, weight=weight, total=total, normed=normed)
    rows_of_program, tile, num_warps = _shape(width, x.dtype.itemsize)
    return Launch(
        _add_rms_norm,
        (-(-rows // rows_of_program),),
        {
            "x": x,
            "delta": x if delta is None else delta,
            "weight": weight,
            "total": total,
            "normed": normed,
            "rows": rows,
            "width": width,
            "eps": eps,
            "HAS_DELTA": delta is not None,
            "ROWS": rows_of_program,
            "TILE": tile,
        },
        num_warps=num_warps,
        num_stages=1,
    )


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta, rounded to their dtype, and that divided by its root mean square, times weight.

    x, delta: [T, H] contiguous, float16, bfloat16 or float32, delta None for nothing to add; then x itself
    comes back as the sum. weight: [H]. Raises ValueError for what does not fit."""
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    add_rms_norm_launch(x, delta, weight, eps, total, normed).run()
    return total, normed
