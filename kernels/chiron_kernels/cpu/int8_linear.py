"""Linear layers with 8-bit weights and activations on the CPU: source/int8_linear.c.

Weights and activations are rounded in groups of 32 along the input axis, each with its own scale.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

GROUP = 32
COLUMNS = 32
LARGEST = 127


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """A weight [outputs, inputs] as the kernel reads it, both filled up with 0 to multiples of 32.

    values: uint8 [outputs / 32, inputs / 4, 32, 4], the rounded weight plus 128.
    scales: bfloat16 [outputs / 32, inputs / 32, 32]. bias: float32 [outputs], filled up, or None.
    """

    values: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    inputs: int
    outputs: int


def pack_int8(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8Weight:
    """Round a floating-point weight [outputs, inputs] to 8 bits. Raises ValueError where it holds
    anything that is not finite."""
    outputs, inputs = weight.shape
    rounded, scales = round_weight(pad(weight.float(), (0, -inputs % GROUP, 0, -outputs % COLUMNS)))
    if not bool(scales.isfinite().all()):
        raise ValueError(f"a weight of shape {list(weight.shape)} holds values that are not finite")
    blocks = rounded.shape[0] // COLUMNS
    values = (rounded + 128).to(torch.uint8).view(blocks, COLUMNS, -1, 4).transpose(1, 2).contiguous()
    if bias is not None:
        bias = pad(bias.float(), (0, -outputs % COLUMNS)).contiguous()
    scales = scales.view(blocks, COLUMNS, -1).transpose(1, 2).contiguous()
    return Int8Weight(values, scales, bias, inputs, outputs)


def round_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K], K a multiple of 32, as whole numbers in [-127, 127] (float [N, K]) and scales
    bfloat16 [N, K / 32]: the weight is about the one times the other. What lies below the smallest
    normal bfloat16 becomes 0."""
    groups = weight.unflatten(1, (-1, GROUP))
    top = groups.abs().amax(dim=-1)
    # Rounded up, so that the largest still fits: 1 + 2^-7 is the next number at most.
    scales = (top / LARGEST * (1 + 2**-7)).bfloat16()
    steps = torch.where(scales >= torch.finfo(torch.bfloat16).smallest_normal, 1 / scales.float(), 0.0)
    return torch.round(groups * steps[..., None]).clamp_(-LARGEST, LARGEST).flatten(1), scales


def int8_linear(library: ctypes.CDLL, x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """x W^T + bias, float32 [T, outputs], for contiguous float32 x [T, inputs]."""
    if x.shape[1] % GROUP:
        x = pad(x, (0, -x.shape[1] % GROUP))
    rows, inputs = x.shape
    padded = weight.values.shape[0] * COLUMNS
    out = torch.empty(rows, padded)
    values = torch.empty(rows, inputs, dtype=torch.int8)
    scales = torch.empty(rows, inputs // GROUP)
    offsets = torch.empty(rows, inputs // GROUP, dtype=torch.int32)
    library.chiron_int8_linear(
        x.data_ptr(),
        rows,
        inputs,
        padded,
        weight.values.data_ptr(),
        weight.scales.data_ptr(),
        None if weight.bias is None else weight.bias.data_ptr(),
        out.data_ptr(),
        values.data_ptr(),
        scales.data_ptr(),
        offsets.data_ptr(),
    )
    return out if padded == weight.outputs else out[:, : weight.outputs].contiguous()
