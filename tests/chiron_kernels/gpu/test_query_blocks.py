"""Which rows each program of the prefill attention takes."""

from __future__ import annotations

import pytest
import torch
from chiron_kernels.gpu.query_blocks import (
    LANES,
    QueryBlocks,
    block_capacity,
    block_rows,
    query_blocks,
    query_blocks_launch,
)
from chiron_kernels.reference.query_blocks import query_blocks as reference_query_blocks

Chunk = tuple[int, int]
"""Tokens and context."""


def steps(chunks: list[Chunk], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    lengths = torch.tensor([0] + [length for length, _ in chunks])
    contexts = torch.tensor([context for _, context in chunks], dtype=torch.int64)
    return lengths.cumsum(0).to(device), contexts.to(device), int(lengths.sum())


def placed(blocks: QueryBlocks) -> list[list[int]]:
    return blocks.entries[: int(blocks.count)].tolist()


MANY = [(7 * i % 5, 11 * i % 97) for i in range(LANES + 9)]


@pytest.mark.parametrize(
    "chunks",
    [
        [(1, 0)],
        [(0, 5)],
        [(0, 5), (3, 0), (0, 0)],
        [(16, 0), (15, 1), (17, 2)],
        [(100, 0), (1, 5000), (40, 60), (40, 60)],
        [(LANES * 16 + 1, 3), (5, 900)],
    ],
)
@pytest.mark.parametrize("group", [1, 3, 40])
def test_equals_the_reference(chunks: list[Chunk], group: int, device: torch.device) -> None:
    starts, contexts, tokens = steps(chunks, device)
    blocks = query_blocks(starts, contexts, tokens, group, 64, rows=16)
    expected = reference_query_blocks(starts, contexts, tokens, group, 64, rows=16)
    assert placed(blocks) == placed(expected)
    assert len(blocks.entries) >= int(blocks.count)


def test_more_chunks_than_are_counted_at_a_time(device: torch.device) -> None:
    starts, contexts, tokens = steps(MANY, device)
    blocks = query_blocks(starts, contexts, tokens, 3, 64, rows=32)
    assert placed(blocks) == placed(reference_query_blocks(starts, contexts, tokens, 3, 64, rows=32))


def test_every_packed_row_is_in_one_block(device: torch.device) -> None:
    starts, contexts, tokens = steps([(9, 4), (0, 0), (70, 1), (1, 33)], device)
    blocks = query_blocks(starts, contexts, tokens, 5, 64, rows=32)
    rows = []
    for chunk, first in placed(blocks):
        length = int(starts[chunk + 1] - starts[chunk]) * 5
        rows += [(chunk, row) for row in range(first, min(first + 32, length))]
    assert sorted(rows) == [
        (chunk, row) for chunk, tokens in enumerate((9, 0, 70, 1)) for row in range(tokens * 5)
    ]


def test_long_work_comes_first(device: torch.device) -> None:
    starts, contexts, tokens = steps([(64, 0), (32, 1000), (16, 20)], device)
    blocks = query_blocks(starts, contexts, tokens, 1, 64, rows=16)
    last = [int(contexts[chunk]) + first + 15 for chunk, first in placed(blocks)]
    assert last == sorted(last, reverse=True)
    assert placed(blocks)[0] == [1, 16]


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("chunks", [1, 3, 7])
@pytest.mark.parametrize("rows", [16, 64])
def test_capacity_holds_the_worst_cut(tokens: int, chunks: int, rows: int) -> None:
    """As many chunks as there are tokens, all of one token but one, cost the most blocks."""
    group = 5
    single = min(chunks, tokens) - 1
    worst = -(-(tokens - single) * group // rows) + single * -(-group // rows)
    assert worst <= block_capacity(tokens, chunks, group, rows)
    assert block_capacity(tokens, 0, group, rows) == 0


def test_tokens_too_few_write_nothing_past_the_end(device: torch.device) -> None:
    starts, contexts, _ = steps([(40, 0)], device)
    memory = torch.full((3, 2), -1, dtype=torch.int32, device=device)
    capacity = block_capacity(20, 1, 1, 16)
    blocks = QueryBlocks(memory[:capacity], torch.zeros(1, dtype=torch.int32, device=device), 16, 1)
    query_blocks_launch(starts, contexts, 20, blocks).run()
    assert int(blocks.count) == capacity < 3
    assert (memory[capacity:] == -1).all()


@pytest.mark.parametrize(
    ("tokens", "chunks", "group", "head_dim", "rows"),
    [
        (2048, 1, 4, 128, 128),
        (16, 16, 4, 128, 16),
        (64, 8, 4, 64, 32),
        (100, 8, 5, 96, 64),
        (2048, 1, 4, 256, 64),
    ],
)
def test_rows_follow_the_mean_chunk(tokens: int, chunks: int, group: int, head_dim: int, rows: int) -> None:
    assert block_rows(tokens, chunks, group, head_dim) == rows


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("query_starts", lambda x: x[:2], r"query_starts is \[2\]; it must be \[3\]"),
        ("query_starts", lambda x: x.int(), "query_starts is int32; it must be int64"),
        ("query_starts", lambda x: x.repeat(2)[::2], "query_starts has strides"),
        ("context_lens", lambda x: x[None], r"context_lens is \[1, 2\]; it must be \[any\]"),
        ("context_lens", lambda x: x.to("meta"), "context_lens is on meta"),
        ("tokens", lambda x: -1, "tokens is -1; it must be 0 or more"),
        ("group", lambda x: 0, "group is 0; it must be 1 or more"),
        ("rows", lambda x: 48, "rows is 48; it must be one of"),
    ],
)
def test_bad_arguments_are_named(name: str, change, says: str, device: torch.device) -> None:
    starts, contexts, tokens = steps([(3, 0), (4, 2)], device)
    arguments = {
        "query_starts": starts,
        "context_lens": contexts,
        "tokens": tokens,
        "group": 2,
        "head_dim": 64,
        "rows": 16,
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=says):
        query_blocks(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("entries", lambda x: x[:-1], "entries is "),
        ("entries", lambda x: x.long(), "entries is int64; it must be int32"),
        ("count", lambda x: x.repeat(2), r"count is \[2\]; it must be \[1\]"),
    ],
)
def test_bad_outputs_are_named(name: str, change, says: str, device: torch.device) -> None:
    starts, contexts, tokens = steps([(3, 0), (4, 2)], device)
    outputs = {
        "entries": torch.empty(block_capacity(tokens, 2, 2, 16), 2, dtype=torch.int32, device=device),
        "count": torch.empty(1, dtype=torch.int32, device=device),
    }
    outputs[name] = change(outputs[name])
    with pytest.raises(ValueError, match=says):
        query_blocks_launch(starts, contexts, tokens, QueryBlocks(**outputs, rows=16, group=2))
