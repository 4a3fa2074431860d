"""Linear layers with 8-bit weights and activations on the CPU: source/int8_linear.c.

The input axis is turned by a Hadamard matrix, 64 inputs at a time; then a row of weights is rounded with one
scale, a row of activations with one for every 192 inputs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

TURNED = 64
GROUP = 192
COLUMNS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """A weight [outputs, inputs] as the kernel reads it, filled up with 0 to multiples of 32 and 64.

    values: uint8 [outputs / 32, inputs / 4, 32, 4], the turned and rounded weight plus 128.
    scales: float32 [outputs].
    bias: float32 [outputs], filled up, or None.
    gated: by turns 16 gates and the 16 outputs they let through.
    """

    values: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    inputs: int
    outputs: int
    gated: bool


def pack_int8(
    library: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False
) -> Int8Weight:
    """Round a floating-point weight [outputs, inputs] to 8 bits. gated: its first half are gates, and the
    product is to be silu(gate) * up. Raises ValueError where it holds anything that is not finite, and for
    a gated weight with an odd number of rows."""
    if gated and weight.shape[0] % 2:
        raise ValueError(f"a gated weight has {weight.shape[0]} rows; it must be gates and as many others")
    wanted = weight.shape[0] // 2 if gated else weight.shape[0]
    if gated:
        weight = _interleaved(weight)
        bias = None if bias is None else _interleaved(bias)
    outputs, inputs = weight.shape
    if inputs % TURNED or outputs % COLUMNS:
        weight = pad(weight, (0, -inputs % TURNED, 0, -outputs % COLUMNS))
    weight = weight.float().contiguous()
    rows, columns = weight.shape
    values = torch.empty(rows // COLUMNS, columns // 4, COLUMNS, 4, dtype=torch.uint8, device="cpu")
    scales = torch.empty(rows, dtype=torch.float32, device="cpu")
    library.chiron_pack_int8(weight.data_ptr(), columns, rows, values.data_ptr(), scales.data_ptr())
    if not bool(scales.isfinite().all()):
        raise ValueError(f"a weight of shape [{outputs}, {inputs}] holds values that are not finite")
    if bias is not None:
        bias = pad(bias.float(), (0, -outputs % COLUMNS)).contiguous()
    return Int8Weight(values, scales, bias, inputs, wanted, gated)


def _interleaved(halves: torch.Tensor) -> torch.Tensor:
    """Two halves along the first axis, by turns 16 of each, filled up with 0."""
    both = halves.unflatten(0, (2, -1))
    rows = both.shape[1]
    both = pad(both, (0, 0) * (both.dim() - 2) + (0, -rows % (COLUMNS // 2)))
    return both.unflatten(1, (-1, COLUMNS // 2)).transpose(0, 1).flatten(0, 2)


def int8_linear(library: ctypes.CDLL, x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """x W^T + bias, float32 [T, outputs], or of a gated weight silu(gate) * up; for contiguous float32
    x [T, inputs]. Raises ValueError for any other."""
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != weight.inputs or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} with strides {list(x.stride())}; it must be float32 "
            f"[rows, {weight.inputs}], contiguous"
        )
    if x.shape[1] % TURNED:
        x = pad(x, (0, -x.shape[1] % TURNED))
    rows, inputs = x.shape
    groups = -(-inputs // GROUP)
    padded = weight.values.shape[0] * COLUMNS
    columns = padded // 2 if weight.gated else padded
    out = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    values = torch.empty(rows, inputs, dtype=torch.int8, device="cpu")
    scales = torch.empty(rows, groups, dtype=torch.float32, device="cpu")
    offsets = torch.empty(rows, groups, dtype=torch.int32, device="cpu")
    library.chiron_int8_linear(
        x.data_ptr(),
        rows,
        inputs,
        padded,
        weight.gated,
        weight.values.data_ptr(),
        weight.scales.data_ptr(),
        None if weight.bias is None else weight.bias.data_ptr(),
        out.data_ptr(),
        values.data_ptr(),
        scales.data_ptr(),
        offsets.data_ptr(),
    )
    return out if columns == weight.outputs else out[:, : weight.outputs].contiguous()
