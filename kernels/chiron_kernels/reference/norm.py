"""Residual addition and root-mean-square norm."""

from __future__ import annotations

import torch


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta, rounded to their dtype, and that divided by its root mean square, times weight.

    x, delta: [T, H], delta None for nothing to add. weight: [H]. Returns both [T, H]. Zhang and Sennrich
    2019, arXiv:1910.07467: y = s / sqrt(mean(s^2) + eps) * weight, in float32.
    """
    total = x if delta is None else x + delta
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return total, (wide * scale * weight.float()).to(x.dtype)
