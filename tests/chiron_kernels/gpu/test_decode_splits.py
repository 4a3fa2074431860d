"""How decode attention divides a batch among programs."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from chiron_kernels.gpu import decode_splits as decode_splits_module
from chiron_kernels.gpu.decode_plan import (
    LEAST_SPLIT,
    PROGRAMS_AT_ONCE,
    DecodeSplits,
    most_tiles,
    tile_keys,
)
from chiron_kernels.gpu.decode_splits import MOST_REQUESTS, decode_splits
from chiron_kernels.gpu.multiprocessors import ASSUMED_MULTIPROCESSORS
from chiron_kernels.reference.decode_splits import decode_splits as reference_decode_splits

TILE = 64


def pool(kv_heads: int = 2, block_size: int = 64, head_dim: int = 128) -> torch.Tensor:
    return torch.empty(3, block_size, 2, kv_heads, head_dim, dtype=torch.float16)


def tables(width: int) -> torch.Tensor:
    return torch.zeros(1, width, dtype=torch.int64)


@pytest.mark.parametrize(("query_len", "window"), [(1, None), (4, 65), (2, 1), (3, 2**31 - 1), (3, 2**40)])
@pytest.mark.parametrize("programs", [7, 300])
def test_equals_the_reference(
    programs: int, query_len: int, window: int | None, device: torch.device
) -> None:
    """The last lengths are beyond the table, and below 0."""
    lens = torch.tensor([0, 1, 64, 65, 3000, 700, 8192, 9000, 2**40, -3], device=device)
    arguments = (lens, pool().to(device), tables(128).to(device), query_len, window, programs)
    found, wanted = decode_splits(*arguments), reference_decode_splits(*arguments)
    assert torch.equal(found.requests, wanted.requests)
    used = wanted.work[2] > 0
    assert torch.equal(found.work[2] > 0, used)
    assert torch.equal(found.work[:, used], wanted.work[:, used])


@pytest.mark.parametrize("window", [None, 65])
def test_more_requests_than_are_counted_at_once(
    window: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_splits_module, "REQUESTS", 4)
    lens = torch.tensor([300 * i % 1700 for i in range(13)], device=device)
    arguments = (lens, pool().to(device), tables(128).to(device), 1, window, 40)
    found, wanted = decode_splits(*arguments), reference_decode_splits(*arguments)
    assert torch.equal(found.requests, wanted.requests)
    used = wanted.work[2] > 0
    assert torch.equal(found.work[:, used], wanted.work[:, used])


def test_one_request(device: torch.device) -> None:
    splits = decode_splits(
        torch.tensor([5 * TILE + 1], device=device), pool().to(device), tables(128).to(device)
    )
    assert splits.requests.tolist() == [[0], [3]]
    request, place, count, first, end = splits.work[:, :3].tolist()
    assert (request, place, count) == ([0, 0, 0], [0, 1, 2], [3, 3, 3])
    assert (first, end) == ([0, 2, 4], [2, 4, 6])
    assert not splits.work[2, 3:].any()


def some_lens(generator: random.Random) -> list[int]:
    longest = generator.choice([100, 3000, 100_000])
    return [generator.randint(0, longest) for _ in range(generator.randint(1, 200))]


@pytest.mark.parametrize("seed", range(20))
def test_every_tile_is_in_one_split(seed: int) -> None:
    """And no split is much longer than the others, or too short. The reference raises IndexError where a
    batch has more splits than there is room for."""
    generator = random.Random(seed)
    lens = torch.tensor(some_lens(generator))
    window = generator.choice([None, 1, 1000])
    query_len = generator.randint(1, 8)
    splits = reference_decode_splits(lens, pool(), tables(100_000 // TILE + 1), query_len, window)
    longest = 0
    for request, (column, count) in enumerate(splits.requests.T.tolist()):
        own = splits.work[:, column : column + count]
        assert (own[0] == request).all() and (own[2] == count).all()
        length = int(lens[request])
        lowest = 0 if window is None else max(length - query_len - window + 1, 0)
        assert own[3, 0] == lowest // TILE and own[4, -1] == -(-length // TILE)
        assert torch.equal(own[4, :-1], own[3, 1:])
        sizes = own[4] - own[3]
        assert count == 1 or int(sizes.min()) >= LEAST_SPLIT
        longest = max(longest, int(sizes.max()))
    used = splits.work[:, splits.work[2] > 0]
    fair = (used[4] - used[3]).sum() / splits.programs
    # Rounding the number of splits down to one leaves less than two of the common length in one split.
    assert longest < 2 * max(fair + 1, LEAST_SPLIT)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 66, 128, 129])
@pytest.mark.parametrize("query_len", [1, 2, 8])
def test_no_window_covers_more_tiles_than_counted(window: int, query_len: int) -> None:
    """Counted for each place that the queries' first key may have in its tile."""
    keys = window + query_len - 1
    touched = max((start + keys - 1) // TILE + 1 for start in range(TILE))
    assert most_tiles(1000, TILE, TILE, query_len, window) == touched


def makespan(splits: DecodeSplits) -> float:
    """Tiles that each of as many programs as saturate the memory could have read until the last program
    ends, with the programs of a step started in order, PROGRAMS_AT_ONCE to a multiprocessor, and one program
    to each enough to saturate the memory, which those that run share."""
    saturating = ASSUMED_MULTIPROCESSORS
    used = splits.work[:, splits.work[2] > 0]
    waiting = [float(tiles) for tiles in (used[4] - used[3]).tolist() for _ in range(splits.kv_heads)]
    waiting.reverse()
    running: list[float] = []
    now = 0.0
    while waiting or running:
        while waiting and len(running) < ASSUMED_MULTIPROCESSORS * PROGRAMS_AT_ONCE:
            running.append(waiting.pop())
        step = min(running)
        now += step * max(len(running) / saturating, 1.0)
        running = [left - step for left in running if left > step]
    return now


@pytest.mark.parametrize("kv_heads", [3, 8])
@pytest.mark.parametrize("length", [1024, 4096])
def test_one_more_request_is_no_cliff(length: int, kv_heads: int) -> None:
    """For its share of the reading, a batch takes nearly as long as one with one request less."""
    kv, table = pool(kv_heads), tables(length // TILE)
    shares = []
    for batch in range(1, 161):
        splits = reference_decode_splits(torch.full((batch,), length), kv, table)
        ideal = max(batch * kv_heads * length / TILE / ASSUMED_MULTIPROCESSORS, LEAST_SPLIT)
        shares.append(makespan(splits) / ideal)
    assert max(later / earlier for earlier, later in itertools.pairwise(shares)) <= 1.25
    assert max(shares) <= 1.25


def test_one_long_request_is_shared_out() -> None:
    """Among many short ones, whose programs would else all wait for its end."""
    lens = torch.tensor([65536] + [512] * 63)
    splits = reference_decode_splits(lens, pool(8), tables(1024))
    total = int((-(-lens // TILE)).sum()) * 8
    assert makespan(splits) <= 1.25 * total / ASSUMED_MULTIPROCESSORS


@pytest.mark.parametrize(
    ("block_size", "head_dim", "dtype", "tile"),
    [
        (16, 128, torch.bfloat16, 64),
        (64, 128, torch.bfloat16, 64),
        (128, 64, torch.bfloat16, 64),
        (32, 128, torch.bfloat16, 32),
        (64, 256, torch.bfloat16, 32),
        (16, 256, torch.float32, 16),
        (64, 80, torch.float16, 64),
    ],
)
def test_tile(block_size: int, head_dim: int, dtype: torch.dtype, tile: int) -> None:
    assert tile_keys(block_size, head_dim, dtype) == tile


def test_more_splits_than_a_grid_has_room_for() -> None:
    with pytest.raises(ValueError, match="programs is 1000000, for which 64 requests may have 262144 splits"):
        decode_splits(torch.zeros(64, dtype=torch.int64), pool(), tables(8192), programs=10**6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lens": torch.zeros(2, dtype=torch.int32)}, "lens is int32; it must be int64"),
        ({"lens": torch.zeros(2, 1, dtype=torch.int64)}, r"lens is \[2, 1\]; it must be \[any\]"),
        ({"lens": torch.zeros(4, dtype=torch.int64)[::2]}, "lens has strides"),
        ({"lens": torch.zeros(MOST_REQUESTS + 1, dtype=torch.int64)}, "lens has 32769 requests"),
        ({"lens": torch.zeros(2, dtype=torch.int64, device="meta")}, "lens is on meta"),
        ({"kv": pool().double()}, "kv is float64"),
        ({"kv": pool()[0]}, r"kv is \[64, 2, 2, 128\]"),
        ({"kv": pool(block_size=24)}, "kv has blocks of 24 tokens; they must be of a power of two"),
        ({"kv": pool(head_dim=258)}, "kv has heads of 258; they must be even and up to 256"),
        ({"kv": pool(head_dim=63)}, "kv has heads of 63"),
        ({"kv": pool().transpose(2, 3).contiguous().transpose(2, 3)}, "kv has strides"),
        ({"tables": tables(0)}, "its rows must hold a block at least"),
        ({"query_len": 0}, "query_len is 0; it must be 1 to 8"),
        ({"query_len": 9}, "query_len is 9; it must be 1 to 8"),
        ({"window": 0}, "window is 0; it must be 1 or more, or None"),
        ({"programs": 0}, "programs is 0; it must be 1 or more, or None"),
    ],
)
def test_bad_arguments_are_named(change: dict, says: str) -> None:
    arguments = {"lens": torch.zeros(2, dtype=torch.int64), "kv": pool(), "tables": tables(4)}
    with pytest.raises(ValueError, match=says):
        decode_splits(**{**arguments, **change})
