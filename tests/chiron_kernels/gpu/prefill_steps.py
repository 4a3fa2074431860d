"""Steps of random chunks over a random paged pool, in which whatever must not be read is NaN."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from typing import Any

import torch
from chiron_kernels.gpu.prefill_attention import prefill_attention
from chiron_kernels.gpu.query_blocks import QueryBlocks, query_blocks
from chiron_kernels.reference.prefill_attention import prefill_attention as reference_prefill_attention

Chunk = tuple[int, int]
"""Tokens and context."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Of the whole result, relative to its norm."""

LSE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Step:
    """The arguments of `prefill_attention`, blocks left out."""

    q: torch.Tensor
    kv: torch.Tensor
    tables: torch.Tensor
    table_rows: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    scale: float

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.kv.shape[3]

    def blocks(self, rows: int | None = None) -> QueryBlocks:
        tokens, _, head_dim = self.q.shape
        return query_blocks(self.query_starts, self.context_lens, tokens, self.group, head_dim, rows)

    def arguments(self, rows: int | None = None) -> dict[str, Any]:
        return {**self.__dict__, "blocks": self.blocks(rows)}

    def without_blocks_before(self, window: int) -> Step:
        """As an engine leaves the tables that frees what no row's window holds."""
        tables = self.tables.clone()
        for row, context in zip(self.table_rows.tolist(), self.context_lens.tolist(), strict=True):
            tables[row, : max(context - window + 1, 0) // self.kv.shape[1]] = 0
        return replace(self, tables=tables)


def poisoned_pool(
    blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The second of two layers, NaN all over."""
    pool = torch.full(
        (blocks, 2, block_size, 2, kv_heads, head_dim), float("nan"), dtype=dtype, device=device
    )
    return pool[:, 1]


def far_pool(
    blocks: int, block_size: int, kv_heads: int, head_dim: int, stride: int, device: torch.device
) -> torch.Tensor:
    """Blocks `stride` halves apart. On the CPU only what is written takes memory."""
    elements = blocks * stride
    if device.type == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = torch.frombuffer(mmap.mmap(-1, elements * 2, flags=flags), dtype=torch.float16)
    else:
        memory = torch.zeros(elements, dtype=torch.float16, device=device)
    block = memory.view(blocks, stride)[:, : block_size * 2 * kv_heads * head_dim]
    return block.unflatten(1, (block_size, 2, kv_heads, head_dim))


def step(
    chunks: list[Chunk],
    device: torch.device,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float16,
    before: int = 0,
    after: int = 0,
    kv: torch.Tensor | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Step:
    """before, after: rows of q in no chunk. kv: a pool to fill, its last blocks first. kv_dtype: where it is
    not that of q."""
    generator = torch.Generator().manual_seed(len(chunks) * 1000 + sum(chunks[-1]) + head_dim)
    query_heads, kv_heads = heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    lengths = [length + context for length, context in chunks]
    needed = [-(-length // block_size) for length in lengths]
    width = max(needed) + 1
    if kv is None:
        kv = poisoned_pool(sum(needed) + 3, block_size, kv_heads, head_dim, kv_dtype or dtype, device)
    # Never block 0, which pads the tables.
    ids = 1 + torch.randperm(len(kv) - 1, generator=generator)
    if sum(needed) < len(kv) - 1:
        ids = ids.sort(descending=True).values[: sum(needed)][
            torch.randperm(sum(needed), generator=generator)
        ]
    tables = torch.zeros(len(chunks) + 2, width, dtype=torch.int64)
    table_rows = torch.randperm(len(tables), generator=generator)[: len(chunks)]
    taken = 0
    for row, length, count in zip(table_rows.tolist(), lengths, needed, strict=True):
        tables[row, :count] = ids[taken : taken + count]
        for number, block in enumerate(ids[taken : taken + count].tolist()):
            tokens = min(length - number * block_size, block_size)
            kv[block, :tokens] = normal(tokens, 2, kv_heads, head_dim)
        taken += count
    starts = torch.tensor([before] + [length for length, _ in chunks]).cumsum(0)
    tokens = int(starts[-1]) + after
    packed = torch.full(
        (tokens, (query_heads + 2 * kv_heads) * head_dim), float("nan"), dtype=dtype, device=device
    )
    packed[:, : query_heads * head_dim] = normal(tokens, query_heads * head_dim)
    contexts = torch.tensor([context for _, context in chunks], dtype=torch.int64)
    return Step(
        packed[:, : query_heads * head_dim].unflatten(1, (query_heads, head_dim)),
        kv,
        tables.to(device),
        table_rows.to(device),
        starts.to(device),
        contexts.to(device),
        head_dim**-0.5,
    )


def check(given: Step, rows: int | None = None, **options: Any) -> torch.Tensor:
    """The result, found close to that in float64 of the same inputs; so are the sums of the softmax."""
    lse = torch.empty(given.q.shape[:2], device=given.q.device)
    out = prefill_attention(**given.arguments(rows), lse=lse, **options)
    exact_lse = torch.zeros_like(lse, dtype=torch.float64)
    used, tables = given.tables.unique(return_inverse=True)
    wide = replace(given, q=given.q.double(), kv=given.kv[used].double(), tables=tables).__dict__
    exact = reference_prefill_attention(**wide, blocks=None, lse=exact_lse, **options)
    inside = slice(int(given.query_starts[0]), int(given.query_starts[-1]))
    dtype = given.q.dtype
    error = (out[inside].double() - exact[inside]).norm() / exact[inside].norm()
    assert error <= TOLERANCE[dtype], error
    torch.testing.assert_close(lse[inside].double(), exact_lse[inside], rtol=0, atol=LSE_TOLERANCE[dtype])
    for outside in (slice(0, inside.start), slice(inside.stop, None)):
        assert out[outside].isnan().all() and lse[outside].isnan().all()
    return out
