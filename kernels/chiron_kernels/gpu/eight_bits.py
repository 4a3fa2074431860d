"""Keys and values in 8 bits: float8_e4m3fn, with 3 bits of fraction, numbers up to 448 and no infinity.

What is stored is the number divided by the layer's scale, one for its keys and one for its values:

    stored = round(clamp(x * (1 / scale), -448, 448))        x ~ stored * scale

The reciprocal is taken once, rounded to float32, and multiplied with in float32; rounding is to nearest even,
NaN stays NaN. What is too large is stored as the largest there is: the conversion of the GPU does that as
well, that of the interpreter need not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.launch import target_architecture
from chiron_kernels.gpu.paged_kv import EIGHT_BITS, LARGEST_SCALE, LEAST_SCALE

ADA = 89
"""The first GPUs with 8-bit floats."""


@triton.jit
def to_stored(x, inverse_scale, dtype: tl.constexpr):
    """x as the pool holds it: of 8 bits divided by its scale, otherwise just rounded."""
    if dtype == tl.float8e4nv:
        LARGEST: tl.constexpr = 448.0
        scaled = x.to(tl.float32) * inverse_scale
        return tl.clamp(scaled, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(dtype)
    else:
        return x.to(dtype)


def check_target(kv: torch.Tensor) -> None:
    """Raises ValueError for a pool of 8 bits on a GPU that has no such floats."""
    if kv.dtype == EIGHT_BITS and target_architecture() < ADA:
        raise ValueError("kv is float8_e4m3fn; it must be float16, bfloat16, float32 for GPUs before 8.9")


def check_scales(k_scale: float, v_scale: float) -> None:
    """Raises ValueError for a scale out of bounds."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not LEAST_SCALE <= scale <= LARGEST_SCALE:
            raise ValueError(f"{name} is {scale}; it must be {LEAST_SCALE:.3g} to {LARGEST_SCALE:.3g}")


def inverse_scales(kv: torch.Tensor, k_scale: float, v_scale: float) -> tuple[float, float]:
    """What keys and what values are multiplied with to be stored. Raises ValueError for a scale out of
    bounds, and for one other than 1 of a pool that is not of 8 bits."""
    check_scales(k_scale, v_scale)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale != 1 and kv.dtype != EIGHT_BITS:
            raise ValueError(f"{name} is {scale}; it must be 1 where kv is not float8_e4m3fn")
    return 1 / k_scale, 1 / v_scale
