"""The activation of a gated feed-forward layer: act(gate) * up, of one packed product.

A row of `gate_up` is | gate: I | up: I |. A program does a piece of one row, each thread 16 bytes of either
half.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.base_two import LOG2_E
from chiron_kernels.gpu.checks import FLOATS, check_contiguous, check_device, check_dtype, check_shape
from chiron_kernels.gpu.launch import Launch

Activation = Literal["silu", "gelu", "gelu_tanh"]
KINDS = ("silu", "gelu", "gelu_tanh")
NUM_WARPS = 4
HALF_BYTES = NUM_WARPS * 32 * 16
"""What a program reads of either half: one load of 16 bytes a thread."""

_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_SQRT_8_OVER_PI = tl.constexpr(math.sqrt(8 / math.pi))
_CUBIC = tl.constexpr(0.044715)  # of the published approximation of gelu


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def _activated(x, KIND: tl.constexpr):
    if KIND == "silu":
        return x * _sigmoid(x)
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    # (1 + tanh u) / 2 = sigmoid(2 u)
    return x * _sigmoid(x * _SQRT_8_OVER_PI * (1.0 + x * x * _CUBIC))


@triton.jit
def _gated_activation(
    gate_up,  # [T, 2 I] contiguous
    out,  # [T, I] contiguous
    width,  # I
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    start = gate_up + row * 2 * width
    gate = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + width + column, mask=inside, other=0.0).to(tl.float32)
    product = _activated(gate, KIND) * up
    tl.store(out + row * width + column, product.to(out.dtype.element_ty), mask=inside)


def gated_activation_launch(gate_up: torch.Tensor, kind: Activation, out: torch.Tensor) -> Launch:
    """out: [T, I] contiguous, written. Otherwise as `gated_activation`."""
    check_shape("gate_up", gate_up, (None, None))
    check_dtype("gate_up", gate_up, FLOATS)
    check_contiguous("gate_up", gate_up)
    rows, both = gate_up.shape
    if both == 0 or both % 2:
        raise ValueError(f"gate_up has rows of {both}; they must be of two halves of the same size")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be {', '.join(KINDS)}")
    width = both // 2
    check_shape("out", out, (rows, width))
    check_dtype("out", out, (gate_up.dtype,))
    check_contiguous("out", out)
    check_device(gate_up, out=out)
    tile = HALF_BYTES // gate_up.dtype.itemsize
    return Launch(
        _gated_activation,
        # Rows first: the first axis of a grid is the one that may be long.
        (rows, -(-width // tile)),
        {"gate_up": gate_up, "out": out, "width": width, "KIND": kind, "TILE": tile},
        num_warps=NUM_WARPS,
        num_stages=1,
    )


def gated_activation(gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
    """act(gate) * up, [T, I], of gate_up [T, 2 I], contiguous, float16, bfloat16 or float32.

    kind: silu (x sigmoid(x)), gelu (x Phi(x), by the error function) or gelu_tanh, its approximation
    (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2). In float32, rounded once. Raises ValueError for
    what does not fit."""
    check_shape("gate_up", gate_up, (None, None))
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    gated_activation_launch(gate_up, kind, out).run()
    return out
