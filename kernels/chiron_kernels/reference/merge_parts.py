"""Attention over parts of the keys, joined into attention over all of them."""

from __future__ import annotations

import math

import torch


def merge_parts(
    partial: torch.Tensor,
    sums: torch.Tensor,
    query_starts: torch.Tensor,
    dtype: torch.dtype,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H, D] of dtype: the parts' results, weighted with their sums.

    partial: [P, T, H, D], results over each part of the keys. sums: [P, T, H], log2 of their sums of weights,
    -inf where a part has none. query_starts: [C + 1]; other rows than query_starts[0] .. query_starts[C] - 1
    are zeros. lse: [T, H], written: the natural logarithm of the whole sum.
    """
    rows = slice(int(query_starts[0]), int(query_starts[-1]))
    natural = sums[:, rows] * math.log(2)
    whole = torch.logsumexp(natural, dim=0)
    weight = torch.exp(natural - whole)[..., None]
    joined = torch.where(weight > 0, partial[:, rows] * weight, 0.0).sum(dim=0)
    out = torch.zeros(partial.shape[1:], dtype=dtype, device=partial.device)
    out[rows] = joined.to(dtype)
    if lse is not None:
        lse[rows] = whole
    return out
