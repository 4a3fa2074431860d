"""What stands between the matrix products of a decoder layer: with torch, or compiled for the CPU."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from chiron_kernels.cpu import decoder_ops as compiled
from torch.nn.functional import rms_norm, silu

from chiron_engine.model.rope import Angles, rotate


class DecoderOps(Protocol):
    """`x` [T, size] and `heads` [T, H, D] may be changed in place: go on with what comes back."""

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta, and that normalised by its root mean square, times weight [size]."""
        ...

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, [T, size], of gate_up [T, 2 size]."""
        ...

    def rotated(self, heads: torch.Tensor, count: int, angles: Angles) -> torch.Tensor:
        """The first `count` heads, rotated: [T, count, D]; angles as `Rope.angles` gives them."""
        ...


class TorchOps:
    """Any dtype on any device."""

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if delta is not None:
            x = x + delta
        return x, rms_norm(x, weight.shape, weight, eps)

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * up

    def rotated(self, heads: torch.Tensor, count: int, angles: Angles) -> torch.Tensor:
        return rotate(heads[:, :count], angles)


class CompiledOps:
    """float32 on the CPU; what a row gives depends on that row alone, bit for bit."""

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._kernels = kernels

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x, compiled.add_rms_norm(self._kernels, x, delta, weight, eps)

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        return compiled.silu_multiply(self._kernels, gate_up)

    def rotated(self, heads: torch.Tensor, count: int, angles: Angles) -> torch.Tensor:
        compiled.rotate(self._kernels, heads, count, *angles)
        return heads[:, :count]
