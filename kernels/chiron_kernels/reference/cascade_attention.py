"""Decode attention where requests begin with the same blocks."""

from __future__ import annotations

import torch

from chiron_kernels.gpu.cascade_attention import CascadeStep
from chiron_kernels.reference.decode_attention import decode_attention


def cascade_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    step: CascadeStep,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """softmax(scale q k^T) v of the newest token of each request, in float64 and rounded to q's dtype:
    [B, Hq, D].

    As `chiron_kernels.gpu.cascade_attention.cascade_attention` has it: here the blocks of each request's
    prefix and of what is left of it are put into one table.
    """
    whole = _whole_tables(kv.shape[1], step)
    lens = step.rest_lens + step.shared.skipped
    rows = torch.arange(len(lens), device=q.device)
    return decode_attention(
        q, kv, whole, rows, lens, None, scale,
        softcap=softcap, sinks=sinks, lse=lse, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def _whole_tables(block_size: int, step: CascadeStep) -> torch.Tensor:
    """int64 [B, W], of each request alone."""
    shared, tables = step.shared, step.tables
    whole = torch.zeros(len(step.rest_lens), tables.shape[1], dtype=torch.int64, device=tables.device)
    skipped = (shared.skipped // block_size).tolist()
    starts, members = shared.starts.tolist(), shared.members.tolist()
    for group, row in enumerate(shared.table_rows.tolist()):
        for request in members[starts[group] : starts[group + 1]]:
            whole[request, : skipped[request]] = tables[row, : skipped[request]]
    lens = step.rest_lens.tolist()
    for request, (row, skip) in enumerate(zip(step.rest_rows.tolist(), skipped, strict=True)):
        count = -(-lens[request] // block_size)
        rest = step.rest_tables.as_strided((count,), (1,), step.rest_tables.storage_offset() + row)
        whole[request, skip : skip + count] = rest
    return whole
