"""Which rows each program of the prefill attention takes, the longest work first.

A chunk of n tokens has n * G packed rows, G the query heads of a key head: row r is token r // G and head
r % G of the group. Blocks of `rows` packed rows cut each chunk from its start; the last may be short:

    chunk 0, n * G = 300       chunk 1, n * G = 70       rows = 128
    |   0   |  128  | 256 |    |  0  |                   4 blocks

A block costs as many keys as its last row sees. Long blocks that start last would leave the GPU waiting for
them, so the blocks are ordered by falling cost (Graham 1969, "Bounds on multiprocessing timing anomalies":
at most 4/3 of the shortest time, to at most 2 in any order). The costs of one chunk rise from block to
block, so how many of its blocks cost more than w follows from w in closed form, and the place of a block is
a sum over the chunks: nothing is sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.checks import check_contiguous, check_device, check_dtype, check_shape
from chiron_kernels.gpu.launch import HOPPER, Launch, target_architecture

LANES = 64
"""Blocks that one program places, and chunks that it counts at a time."""

BLOCK_ROWS = (16, 32, 64, 128)
"""16 is the least that a matrix instruction takes; from 64 up those of a whole warp group are used."""


@dataclass(frozen=True, slots=True, eq=False)
class QueryBlocks:
    """entries: int32 [N, 2], chunk and first packed row of each block. count: int32 [1], how many of the
    entries are blocks; what follows them may be anything, and without chunks so may count. rows: packed rows
    of a block. group: G."""

    entries: torch.Tensor
    count: torch.Tensor
    rows: int
    group: int


@triton.jit
def _blocks_of(length, rows_log2, GROUP: tl.constexpr):
    """Blocks of a chunk of so many tokens."""
    return (length * GROUP + (1 << rows_log2) - 1) >> rows_log2


@triton.jit
def _blocks_above(cost, length, context, rows_log2, GROUP: tl.constexpr):
    """How many blocks of a chunk cost more than `cost`.

    Block m's last row is token ceil((m + 1) ROWS / G) - 1 or the chunk's last, so it costs
    context + min(length, ceil((m + 1) ROWS / G)) keys. That is more than context + t, 0 <= t < length, where
    (m + 1) ROWS > t G, that is from m = floor(t G / ROWS) on.
    """
    blocks = _blocks_of(length, rows_log2, GROUP)
    tokens = cost - context
    from_block = (tl.maximum(tokens, 0) * GROUP) >> rows_log2
    return tl.where(tokens < length, blocks - from_block, 0)


@triton.jit(
    do_not_specialize=["chunks", "capacity", "rows_log2"],
    do_not_specialize_on_alignment=["query_starts", "context_lens"],
)
def _query_blocks(
    query_starts,  # int64 [C + 1]
    context_lens,  # int64 [C]
    entries,  # int32 [N, 2] out
    count,  # int32 [1] out
    chunks,  # C
    capacity,  # N
    rows_log2,  # of packed rows of a block: shifts by it serve every size
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (c, j) places blocks j * LANES and on of chunk c."""
    # Positions fit 32 bits, also times G: a step has less than 2^31 packed rows.
    chunk = tl.program_id(0)
    length = (tl.load(query_starts + chunk + 1) - tl.load(query_starts + chunk)).to(tl.int32)
    context = tl.load(context_lens + chunk).to(tl.int32)
    blocks = _blocks_of(length, rows_log2, GROUP)
    first = tl.program_id(1) * LANES
    counts_all = (chunk == 0) & (first == 0)
    if (first >= blocks) & (not counts_all):
        return
    block = first + tl.arange(0, LANES)
    cost = context + tl.minimum(length, (((block + 1) << rows_log2) + GROUP - 1) // GROUP)
    # Of equal cost, blocks of earlier chunks and earlier blocks of this one go first. Those of this one that
    # cost as much or more are its last, so `block` less the number before them are its equals before it.
    place = block - (blocks - _blocks_above(cost - 1, length, context, rows_log2, GROUP))
    total = tl.zeros([LANES], tl.int32)
    for base in range(0, chunks, LANES):
        other = base + tl.arange(0, LANES)
        exists = other < chunks
        other_start = tl.load(query_starts + other, mask=exists, other=0)
        other_end = tl.load(query_starts + other + 1, mask=exists, other=0)
        other_length = (other_end - other_start).to(tl.int32)
        other_context = tl.load(context_lens + other, mask=exists, other=0).to(tl.int32)
        total += _blocks_of(other_length, rows_log2, GROUP)
        # An equal counts where its chunk is earlier: it then need only cost more than `cost` - 1.
        least = cost[:, None] - tl.where(other < chunk, 1, 0)[None, :]
        above = _blocks_above(least, other_length[None, :], other_context[None, :], rows_log2, GROUP)
        place += tl.sum(above, axis=1)
    fits = (block < blocks) & (place < capacity)
    tl.store(entries + place * 2, chunk, mask=fits)
    tl.store(entries + place * 2 + 1, block << rows_log2, mask=fits)
    if counts_all:
        tl.store(count, tl.minimum(tl.sum(total, axis=0), capacity))


def block_rows(tokens: int, chunks: int, group: int, head_dim: int) -> int:
    """Packed rows of a block, by the mean of the chunks: short chunks would leave long blocks empty, and
    short blocks read the keys more often. At most as many as leave the registers room for their results."""
    widest_dim = 256 if target_architecture() >= HOPPER else 128
    most = 128 if 2 * head_dim <= widest_dim else 64 if head_dim <= widest_dim else 32
    mean = tokens * group // max(chunks, 1)
    return next((rows for rows in BLOCK_ROWS if mean <= rows < most), most)


def block_capacity(tokens: int, chunks: int, group: int, rows: int) -> int:
    """The most blocks that `tokens` in `chunks` chunks can make: each chunk that has a token may end in a
    block of one row."""
    if chunks == 0:
        return 0
    return (tokens * group + min(chunks, tokens) * (rows - 1)) // rows


def query_blocks_launch(
    query_starts: torch.Tensor, context_lens: torch.Tensor, tokens: int, blocks: QueryBlocks
) -> Launch:
    """blocks: its entries and count are written. Otherwise as `query_blocks`."""
    check_shape("context_lens", context_lens, (None,))
    chunks = context_lens.shape[0]
    check_shape("query_starts", query_starts, (chunks + 1,))
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}; it must be 0 or more")
    if blocks.group < 1:
        raise ValueError(f"group is {blocks.group}; it must be 1 or more")
    if blocks.rows not in BLOCK_ROWS:
        raise ValueError(f"rows is {blocks.rows}; it must be one of {BLOCK_ROWS}")
    capacity = block_capacity(tokens, chunks, blocks.group, blocks.rows)
    check_shape("entries", blocks.entries, (capacity, 2))
    check_shape("count", blocks.count, (1,))
    for name, tensor in (("query_starts", query_starts), ("context_lens", context_lens)):
        check_dtype(name, tensor, (torch.int64,))
        check_contiguous(name, tensor)
    for name, tensor in (("entries", blocks.entries), ("count", blocks.count)):
        check_dtype(name, tensor, (torch.int32,))
        check_contiguous(name, tensor)
    check_device(query_starts, context_lens=context_lens, entries=blocks.entries, count=blocks.count)
    # A program at least, which counts, where no chunk has a token.
    longest = max(-(-tokens * blocks.group // blocks.rows), 1)
    return Launch(
        _query_blocks,
        (chunks, -(-longest // LANES)),
        {
            "query_starts": query_starts,
            "context_lens": context_lens,
            "entries": blocks.entries,
            "count": blocks.count,
            "chunks": chunks,
            "capacity": capacity,
            "rows_log2": blocks.rows.bit_length() - 1,
            "GROUP": blocks.group,
            "LANES": LANES,
        },
        num_warps=4,
        num_stages=1,
    )


def query_blocks(
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    tokens: int,
    group: int,
    head_dim: int,
    rows: int | None = None,
) -> QueryBlocks:
    """The blocks of one step, for all layers with the same head size and query heads to a key head.

    query_starts: int64 [C + 1], chunk c has rows query_starts[c] .. query_starts[c + 1] - 1, none of them
    being allowed. context_lens: int64 [C], keys before a chunk's first row. tokens: no fewer than the chunks
    have, known to the host. group: G. head_dim: D. rows: packed rows of a block, one of `BLOCK_ROWS`; by the
    shapes where not given. Raises ValueError for what does not fit."""
    check_shape("context_lens", context_lens, (None,))
    chunks = context_lens.shape[0]
    if rows is None:
        rows = block_rows(tokens, chunks, group, head_dim)
    capacity = block_capacity(tokens, chunks, group, rows) if rows > 0 else 0
    blocks = QueryBlocks(
        torch.empty(max(capacity, 0), 2, dtype=torch.int32, device=query_starts.device),
        torch.empty(1, dtype=torch.int32, device=query_starts.device),
        rows,
        group,
    )
    query_blocks_launch(query_starts, context_lens, tokens, blocks).run()
    return blocks
