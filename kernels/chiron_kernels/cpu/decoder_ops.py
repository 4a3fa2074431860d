"""What stands between the matrix products of a decoder layer, in float32: source/decoder_ops.c.

Every tensor is contiguous float32 on the CPU but where said otherwise.
"""

from __future__ import annotations

import ctypes

import torch


def add_rms_norm(
    library: ctypes.CDLL, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add `delta` to x [T, size] in place, then x / rms(x) * weight [size]."""
    out = torch.empty_like(x)
    rows, size = x.shape
    added = None if delta is None else delta.data_ptr()
    library.chiron_add_rms_norm(x.data_ptr(), added, weight.data_ptr(), out.data_ptr(), rows, size, eps)
    return out


def silu_multiply(library: ctypes.CDLL, gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [T, size], for gate_up [T, 2 size]: gate first."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=torch.float32, device="cpu")
    library.chiron_silu_multiply(gate_up.data_ptr(), out.data_ptr(), rows, size)
    return out


def rotate(
    library: ctypes.CDLL, x: torch.Tensor, heads: int, cosines: torch.Tensor, sines: torch.Tensor
) -> None:
    """Rotate the first `heads` heads of x [T, H, D] in place; element i pairs with i + D / 2. cosines
    and sines [T, D], the sine with the sign of its element."""
    rows, _, size = x.shape
    library.chiron_rotate(x.data_ptr(), rows, x.stride(0), heads, size, cosines.data_ptr(), sines.data_ptr())
