"""What stands between the matrix products of a decoder layer, in Triton's kernels."""

from __future__ import annotations

import torch
from chiron_kernels.gpu.activation import gated_activation
from chiron_kernels.gpu.norm import add_rms_norm

from chiron_engine.model.rope import Angles, rotate


class TritonOps:
    """Any float on a GPU. Rotation is part of `FusedSelfAttention`; here it is torch's."""

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(x, delta, weight, eps)

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gated_activation(gate_up, "silu")

    def rotated(self, heads: torch.Tensor, count: int, angles: Angles) -> torch.Tensor:
        return rotate(heads[:, :count], angles)
