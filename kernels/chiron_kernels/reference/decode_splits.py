"""Dividing the keys of a decode step among programs."""

from __future__ import annotations

import torch

from chiron_kernels.gpu.decode_plan import LEAST_SPLIT, DecodeSplits, empty_splits


def decode_splits(
    lens: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    query_len: int = 1,
    window: int | None = None,
    programs: int | None = None,
) -> DecodeSplits:
    """How decode attention divides a step over the keys of a batch, request by request.

    As `chiron_kernels.gpu.decode_splits.decode_splits` has it.
    """
    splits = empty_splits(lens, kv, tables, query_len, window, programs)
    spans = []
    for length in lens.tolist():
        keys = min(max(length, 0), splits.table_keys)
        lowest = 0 if window is None else max(keys - query_len - window + 1, 0)
        spans.append((lowest // splits.tile, -(-keys // splits.tile)))
    longest = max(-(-sum(end - first for first, end in spans) // splits.programs), LEAST_SPLIT)
    column = 0
    splits.work.zero_()
    for request, (first, end) in enumerate(spans):
        tiles = end - first
        count = max(tiles // longest, 1)
        splits.requests[:, request] = torch.tensor([column, count])
        for place in range(count):
            begins, ends = (first + step * tiles // count for step in (place, place + 1))
            splits.work[:, column + place] = torch.tensor([request, place, count, begins, ends])
        column += count
    return splits
