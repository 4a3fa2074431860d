"""Which rows each program of the prefill attention takes."""

from __future__ import annotations

import torch

from chiron_kernels.gpu.query_blocks import QueryBlocks, block_rows


def query_blocks(
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    tokens: int,
    group: int,
    head_dim: int,
    rows: int | None = None,
) -> QueryBlocks:
    """Blocks of `rows` packed rows of each chunk, group rows to a token, those first whose last row sees the
    most keys. query_starts: [C + 1]. context_lens: [C]. rows: by the shapes where not given."""
    rows = block_rows(tokens, len(context_lens), group, head_dim) if rows is None else rows
    starts = query_starts.tolist()
    found = []
    for chunk, context in enumerate(context_lens.tolist()):
        packed = (starts[chunk + 1] - starts[chunk]) * group
        for first in range(0, packed, rows):
            last_token = (min(first + rows, packed) - 1) // group
            found.append((-(context + last_token), chunk, first))
    entries = [(chunk, first) for _, chunk, first in sorted(found)]
    device = query_starts.device
    return QueryBlocks(
        torch.tensor(entries, dtype=torch.int32, device=device).view(-1, 2),
        torch.tensor([len(entries)], dtype=torch.int32, device=device),
        rows,
        group,
    )
