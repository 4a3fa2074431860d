"""Joining attention over two sets of keys into attention over both."""

from __future__ import annotations

import torch


def merge_states(
    first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of both parts, and the logarithm of its softmax's sum, in float64, rounded.

    first, second: [T, H, D], attention over disjoint keys. first_lse, second_lse: [T, H], -inf for no keys.
    """
    lse = torch.logaddexp(first_lse.double(), second_lse.double())
    # Of parts that both have no keys, the weights are 0.
    some = torch.where(lse.isneginf(), 0.0, lse)
    weights = [(part.double() - some).exp()[..., None] for part in (first_lse, second_lse)]
    out = first.double() * weights[0] + second.double() * weights[1]
    return out.to(first.dtype), lse.to(first_lse.dtype)
