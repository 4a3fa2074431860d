"""Joining attention over two sets of keys into attention over both."""

from __future__ import annotations

import torch


def merge_states(
    first: torch.Tensor,
    first_lse: torch.Tensor,
    second: torch.Tensor,
    second_lse: torch.Tensor,
    places: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of both parts, and the logarithm of its softmax's sum, in float64, rounded.

    first, second: [T, H, D], attention over disjoint keys. first_lse, second_lse: [T, H], -inf for no keys.
    places: [T], which rows of a longer second part those of the first belong to; the others stay as they are.
    """
    if places is not None:
        out, log_sum = second.clone(), second_lse.clone()
        out[places], log_sum[places] = merge_states(first, first_lse, second[places], second_lse[places])
        return out, log_sum
    lse = torch.logaddexp(first_lse.double(), second_lse.double())
    # Of parts that both have no keys, the weights are 0.
    some = torch.where(lse.isneginf(), 0.0, lse)
    weights = [(part.double() - some).exp()[..., None] for part in (first_lse, second_lse)]
    out = first.double() * weights[0] + second.double() * weights[1]
    return out.to(first.dtype), lse.to(first_lse.dtype)
