"""A batch to decode, in a pool where all that is not a request's own is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from chiron_kernels.gpu.decode_attention import decode_attention
from chiron_kernels.gpu.decode_plan import DecodeSplits
from chiron_kernels.gpu.decode_splits import decode_splits
from chiron_kernels.reference.decode_attention import decode_attention as reference_decode_attention

LAYERS, LAYER = 2, 1
SPARE_SLOTS = 2

RELATIVE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Of the norm of all errors to that of the results: kernels round probabilities to the dtype, and results."""
EACH = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LSE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@dataclass
class Batch:
    """Arguments of `decode_attention`."""

    q: torch.Tensor
    kv: torch.Tensor
    tables: torch.Tensor
    table_rows: torch.Tensor
    lens: torch.Tensor
    query_len: int
    scale: float

    def splits(self, window: int | None = None, programs: int | None = None) -> DecodeSplits:
        return decode_splits(self.lens, self.kv, self.tables, self.query_len, window, programs)

    def attend(self, programs: int | None = None, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and lse of the kernel."""
        lse = torch.full(self.q.shape[:2], torch.nan, device=self.q.device)
        splits = self.splits(options.get("window"), programs)
        out = decode_attention(
            self.q, self.kv, self.tables, self.table_rows, self.lens, splits, self.scale,
            query_len=self.query_len, lse=lse, **options,
        )  # fmt: skip
        return out, lse

    def exact(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Values, float64, and lse of the reference."""
        lse = torch.empty(self.q.shape[:2], device=self.q.device)
        out = reference_decode_attention(
            self.q.double(), self.kv, self.tables, self.table_rows, self.lens, None, self.scale,
            query_len=self.query_len, lse=lse, **options,
        )  # fmt: skip
        return out, lse


def make_batch(
    lens: Sequence[int],
    device: torch.device,
    *,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 64,
    dtype: torch.dtype = torch.float16,
    query_len: int = 1,
) -> Batch:
    """Requests of these lengths, in blocks and slots at random. q is a part of packed q, k and v."""
    generator = torch.Generator().manual_seed(sum(lens) * head_dim + block_size)
    counts = [-(-length // block_size) for length in lens]
    width, blocks, slots = max(*counts, 1) + 1, sum(counts) + 1, len(lens) + SPARE_SLOTS
    storage = torch.full((blocks, LAYERS, block_size, 2, kv_heads, head_dim), torch.nan).to(dtype)
    kv = storage[:, LAYER]
    free = (torch.randperm(blocks - 1, generator=generator) + 1).tolist()
    tables = torch.zeros(slots, width, dtype=torch.int64)
    table_rows = torch.randperm(slots, generator=generator)[: len(lens)]
    for row, length in zip(table_rows.tolist(), lens, strict=True):
        for place in range(-(-length // block_size)):
            block = free.pop()
            tables[row, place] = block
            own = kv[block, : length - place * block_size]
            own.copy_(torch.randn(own.shape, generator=generator))
    packed = torch.randn(len(lens) * query_len, (heads + 2 * kv_heads) * head_dim, generator=generator)
    q = packed.to(device, dtype)[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    return Batch(
        q=q,
        kv=storage.to(device)[:, LAYER],
        tables=tables.to(device),
        table_rows=table_rows.to(device),
        lens=torch.tensor(lens, device=device),
        query_len=query_len,
        scale=head_dim**-0.5,
    )


def assert_exact(batch: Batch, programs: int | None = None, **options: Any) -> None:
    """The kernel's values and lse are the reference's, but for rounding."""
    assert_close(batch.attend(programs, **options), batch.exact(**options), batch.q.dtype)


def assert_close(
    found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> None:
    out, exact = found[0].double(), wanted[0].double()
    assert found[0].dtype == dtype
    torch.testing.assert_close(out, exact, rtol=EACH[dtype], atol=EACH[dtype])
    assert (out - exact).norm() <= RELATIVE[dtype] * exact.norm()
    torch.testing.assert_close(found[1], wanted[1], rtol=LSE[dtype], atol=LSE[dtype])
