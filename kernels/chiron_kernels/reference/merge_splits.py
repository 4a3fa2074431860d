"""Joining what the splits of a request found."""

from __future__ import annotations

import math
from typing import Any

import torch


def merge_splits(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    splits: Any,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """The attention of requests with several splits, from that of each split, in float64.

    As `chiron_kernels.gpu.merge_splits.merge_splits` has it: partial [capacity, Hkv, query_len * G, D] and
    partial_lse, to the base 2, are weighted by 2^partial_lse. splits: its requests and query_len are used.
    """
    _, kv_heads, rows, head_dim = partial.shape
    group = rows // splits.query_len
    for request, (first, count) in enumerate(splits.requests.T.tolist()):
        if count == 1:
            continue
        columns = slice(first, first + count)
        log_sums = partial_lse[columns].double() * math.log(2.0)
        weights = log_sums.softmax(dim=0)[..., None]
        joined = (partial[columns].double() * weights).sum(dim=0)
        # Rows are new token by new token, and in each the group's query heads.
        by_token = joined.view(kv_heads, splits.query_len, group, head_dim).transpose(0, 1).flatten(1, 2)
        target = slice(request * splits.query_len, (request + 1) * splits.query_len)
        out[target] = by_token.to(out.dtype)
        if lse is not None:
            total = log_sums.logsumexp(dim=0).view(kv_heads, splits.query_len, group)
            lse[target] = total.transpose(0, 1).flatten(1).float()
