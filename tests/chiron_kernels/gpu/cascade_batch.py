"""A batch to decode in which groups of requests begin with the same blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from chiron_kernels.gpu.cascade_attention import CascadeStep, cascade_attention, cascade_step
from chiron_kernels.shared_prefixes import SharedPrefixes

from tests.chiron_kernels.gpu.decode_batch import Batch, assert_close, make_batch

Group = tuple[Sequence[int], int]
"""Numbers of requests, and the blocks that all of them begin with."""


def make_shared(batch: Batch, groups: Sequence[Group]) -> SharedPrefixes:
    """The requests of a group take over the blocks of its first: the blocks that were there are not read any
    more, as they are made NaN."""
    device, block_size = batch.q.device, batch.kv.shape[1]
    skipped = torch.zeros(len(batch.lens), dtype=torch.int64, device=device)
    for members, blocks in groups:
        rows = batch.table_rows[list(members)]
        batch.kv[batch.tables[rows[1:], :blocks]] = torch.nan
        batch.tables[rows, :blocks] = batch.tables[rows[0], :blocks].clone()
        skipped[list(members)] = blocks * block_size
    members = list(chain.from_iterable(members for members, _ in groups))

    def numbers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return SharedPrefixes(
        members=numbers(members),
        starts=numbers([0, *(len(members) for members, _ in groups)]).cumsum(0),
        table_rows=batch.table_rows[[members[-1] for members, _ in groups]].contiguous(),
        lens=numbers([blocks * block_size for _, blocks in groups]),
        skipped=skipped,
        longest=max(blocks for _, blocks in groups) * block_size,
        everyone=members == list(range(len(batch.lens))),
    )


def step_of(batch: Batch, shared: SharedPrefixes, programs: int | None = None) -> CascadeStep:
    heads = batch.q.shape[1]
    return cascade_step(shared, batch.lens, batch.kv, batch.tables, batch.table_rows, heads, programs)


def attend(batch: Batch, step: CascadeStep, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and lse of the kernels."""
    lse = torch.full(batch.q.shape[:2], torch.nan, device=batch.q.device)
    out = cascade_attention(batch.q, batch.kv, step, batch.scale, lse=lse, **options)
    return out, lse


def check_cascade(
    lens: Sequence[int],
    groups: Sequence[Group],
    device: torch.device,
    *,
    programs: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    **shape: Any,
) -> None:
    """The result is that of the reference of decode attention, which knows nothing of groups."""
    batch = make_batch(lens, device, **shape)
    step = step_of(batch, make_shared(batch, groups), programs)
    exact = batch.exact(softcap=softcap, sinks=sinks)
    assert_close(attend(batch, step, softcap=softcap, sinks=sinks), exact, batch.q.dtype)
