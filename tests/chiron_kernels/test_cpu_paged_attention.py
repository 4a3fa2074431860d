"""The compiled CPU attention against the torch reference, over poisoned pools."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from chiron_kernels.cpu.paged_attention import (
    RunTable,
    can_attend,
    chunk_runs,
    decode_runs,
    longest_run,
    paged_attention,
)
from chiron_kernels.torch_attention import chunk_attention, chunk_mask

OPTIONS = [
    {},
    {"window": 37},
    {"window": 1},
    {"softcap": 5.0, "sinks": True},
    {"window": 70, "softcap": 2.0, "sinks": True},
]
# Query heads, key heads, head size: groups of one, of some, of more than a run takes, odd sizes.
HEADS = [(9, 3, 64), (4, 4, 80), (16, 2, 128), (50, 2, 32), (6, 1, 256), (3, 3, 20)]
BLOCK = 16


@dataclass
class Sequence:
    """A request whose first `context` tokens lie in the pool and whose next `count` come in this step."""

    context: int
    count: int
    table: torch.Tensor
    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def where(self) -> tuple[torch.Tensor, torch.Tensor]:
        position = torch.arange(self.context, self.context + self.count)
        return self.table[position // BLOCK], position % BLOCK

    def runs(self, row: int, longest: int) -> RunTable:
        if self.count == 1:
            runs = decode_runs(self.table[None], torch.tensor([0]), torch.tensor([self.context + 1]))
            runs[:, 0] = row
            return runs
        return chunk_runs(row, self.count, self.context, self.table, longest)


class Pool:
    """Blocks of one layer, NaN wherever no sequence wrote."""

    def __init__(self, kv_heads: int, head: int, dtype: torch.dtype, blocks: int = 200) -> None:
        self.kv = torch.full((blocks, BLOCK, 2, kv_heads, head), math.nan, dtype=dtype)
        self._free = torch.randperm(blocks).tolist()

    def add(self, context: int, count: int, query_heads: int) -> Sequence:
        length, (_, _, _, kv_heads, head) = context + count, self.kv.shape
        table = torch.tensor([self._free.pop() for _ in range(-(-length // BLOCK))])
        keys, values = (torch.randn(length, kv_heads, head).to(self.kv.dtype) for _ in range(2))
        position = torch.arange(context)
        self.kv[table[position // BLOCK], position % BLOCK, 0] = keys[:context]
        self.kv[table[position // BLOCK], position % BLOCK, 1] = values[:context]
        return Sequence(
            context, count, table, torch.randn(count, query_heads, head), keys.float(), values.float()
        )


def attend(
    library: ctypes.CDLL, pool: Pool, sequences: list[Sequence], scale: float, **options: object
) -> list[torch.Tensor]:
    """What each sequence's rows get when all go through the kernel together."""
    query_heads, kv_heads = sequences[0].q.shape[1], pool.kv.shape[3]
    longest = longest_run(library, query_heads, kv_heads)
    q = torch.cat([s.q for s in sequences])
    k, v = (torch.cat([getattr(s, n)[s.context :] for s in sequences]) for n in ("keys", "values"))
    # As the decoder hands them over: views of one tensor, their rows apart.
    q, k, v = torch.cat((q, k, v), dim=1).split((query_heads, kv_heads, kv_heads), dim=1)
    rows = np.cumsum([0] + [s.count for s in sequences])
    runs = np.concatenate([s.runs(int(row), longest) for s, row in zip(sequences, rows, strict=False)])
    blocks, offsets = (torch.cat(parts) for parts in zip(*(s.where() for s in sequences), strict=True))
    out = paged_attention(library, q, k, v, pool.kv, blocks, offsets, runs, scale, **options)  # type: ignore[arg-type]
    return list(out.split([s.count for s in sequences]))


def sinks_of(option: dict[str, object], query_heads: int) -> torch.Tensor | None:
    return torch.linspace(-1, 2, query_heads) if option.get("sinks") else None


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_equals_the_reference(
    library: ctypes.CDLL, heads: tuple[int, int, int], dtype: torch.dtype, option: dict[str, object]
) -> None:
    torch.manual_seed(0)
    query_heads, kv_heads, head = heads
    pool = Pool(kv_heads, head, dtype)
    shapes = [(0, 1), (63, 1), (64, 1), (199, 1), (0, 7), (13, 50), (64, 64), (100, 130)]
    sequences = [pool.add(context, count, query_heads) for context, count in shapes]
    window, softcap, sinks = option.get("window"), option.get("softcap"), sinks_of(option, query_heads)
    found = attend(library, pool, sequences, head**-0.5, window=window, softcap=softcap, sinks=sinks)
    for sequence, out in zip(sequences, found, strict=True):
        mask = chunk_mask(sequence.count, sequence.context, window, torch.float32, torch.device("cpu"))  # type: ignore[arg-type]
        wanted = chunk_attention(
            sequence.q,
            sequence.keys,
            sequence.values,
            mask,
            head**-0.5,
            softcap,
            sinks,  # type: ignore[arg-type]
        )
        assert (out - wanted).abs().max() < 1e-5
        position = torch.arange(sequence.context + sequence.count)
        stored = pool.kv[sequence.table[position // BLOCK], position % BLOCK].float()
        assert torch.equal(stored[:, 0], sequence.keys) and torch.equal(stored[:, 1], sequence.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 2, 80), (5, 1, 36), (16, 2, 128)], ids=str)
def test_a_row_gets_the_same_bits_alone_and_however_its_prompt_is_cut(
    library: ctypes.CDLL, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    query_heads, kv_heads, head = heads
    pool = Pool(kv_heads, head, dtype, blocks=400)
    whole = pool.add(0, 150, query_heads)
    others = [pool.add(length, 1, query_heads) for length in range(5, 120, 4)]
    together = attend(library, pool, [*others, whole], 0.125)
    for other, out in zip(others, together, strict=False):
        assert torch.equal(attend(library, pool, [other], 0.125)[0], out)
    pieces, start = [], 0
    for count in (1, 63, 8, 77, 1):
        part = slice(start, start + count)
        ends = start + count
        piece = Sequence(start, count, whole.table, whole.q[part], whole.keys[:ends], whole.values[:ends])
        pieces.append(attend(library, pool, [piece], 0.125)[0])
        start += count
    assert torch.equal(torch.cat(pieces), together[-1])


def test_values_are_rounded_to_bfloat16_as_torch_does(library: ctypes.CDLL) -> None:
    torch.manual_seed(2)
    pool = Pool(1, 32, torch.bfloat16)
    sequence = pool.add(0, 64, 1)
    sequence.keys = torch.randn(64, 1, 32) * torch.logspace(-30, 30, 64)[:, None, None]
    sequence.keys[0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    attend(library, pool, [sequence], 1.0)
    position = torch.arange(64)
    stored = pool.kv[sequence.table[position // BLOCK], position % BLOCK, 0]
    assert torch.equal(stored.nan_to_num(nan=7.0), sequence.keys.to(torch.bfloat16).nan_to_num(nan=7.0))


def test_large_scores_do_not_overflow(library: ctypes.CDLL) -> None:
    torch.manual_seed(3)
    pool = Pool(1, 64, torch.float32)
    sequence = pool.add(100, 1, 2)
    (out,) = attend(library, pool, [sequence], 1e4)
    best = (sequence.q[0] @ sequence.keys[:, 0].T).argmax(dim=1)
    assert torch.allclose(out[0], sequence.values[best, 0])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("broken", [3, slice(0, 64)], ids=str)
def test_a_score_that_is_no_number_does_not_become_one(
    library: ctypes.CDLL, softcap: float | None, broken: int | slice
) -> None:
    torch.manual_seed(4)
    pool = Pool(1, 64, torch.float32)
    sequence = pool.add(100, 1, 2)
    position = torch.arange(101)[broken]
    pool.kv[sequence.table[position // BLOCK], position % BLOCK, 0] = math.nan
    (out,) = attend(library, pool, [sequence], 0.125, softcap=softcap)
    assert not out.isfinite().any()


def test_heads_it_does_not_take() -> None:
    assert can_attend(256, torch.float32) and can_attend(33, torch.float32)
    assert not can_attend(257, torch.float32)
    assert not can_attend(33, torch.bfloat16)
    assert not can_attend(64, torch.float16)
