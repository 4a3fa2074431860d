"""How decode attention divides a batch: sizes that follow from shapes alone, on the host.

A tile is the keys that one step of the kernel's loop takes. A split is a run of a request's tiles that one
program of the kernel takes for one key head. How many splits each request gets depends on all lengths of
the batch, which only the device knows (`decode_splits`); here is what no lengths can exceed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chiron_kernels.gpu.checks import check_device, check_shape
from chiron_kernels.gpu.launch import power_of_two_from
from chiron_kernels.gpu.multiprocessors import multiprocessors
from chiron_kernels.gpu.paged_kv import STORED, check_kv, check_tables

MOST_QUERIES = 8
"""New tokens of a request: one, and what was drafted. More are a chunk, for `prefill_attention`."""

LEAST_SPLIT = 2
"""Tiles of the shortest split: the kernel has at least as many under way at once, so that shorter ones would
end no sooner. A request with two splits thus has more keys than MOST_QUERIES: each query sees some."""

TILE_BYTES = 16384
"""Of a tile's keys, and of its values: the two of three pipeline stages leave room for three programs on a
multiprocessor of an H100."""

LONGEST_TILE = 64
"""Keys: a block of the size that the engine gives these kernels, so that a tile is one box in it."""

SHORTEST_TILE = 16
"""Keys: the matrix instructions take no fewer for the product of probabilities and values."""

SMALLEST_BLOCK = 32
"""Tokens of a block from which on a tile is no longer than a block, and so needs one look into the table.
Tiles of 16 keys would spend more on each step than the look-ups cost."""

MOST_SPLITS = 65535
"""Of all requests: each is at a place of its own on the second axis of a grid."""

PROGRAMS_AT_ONCE = 3
"""Programs that fit a multiprocessor from Hopper on, of up to 168 registers a thread; more would wait for
these to end. An A100 holds two, and so do all of the configurations with more registers: for them there are
half as many programs again as one wave holds."""

SHARES_OF_WAVES = 8 / 3
"""Programs to a wave where there are more requests than one holds: two for each request, up to 4/3 waves of
requests. With one each, those after the first wave, a third of a wave at most, would have the device to
themselves for as long as that wave took; halved, they are the third of three rounds of half the time. More
than a third of a wave keep the memory busy enough. Reasoned, not timed."""


@dataclass(frozen=True, slots=True, eq=False)
class DecodeSplits:
    """The work of one decode step, for all layers with this geometry.

    work: int32 [5, capacity], a column for each split: the request, the split's place among the splits of
    the request, how many it has, its first tile and the tile after its last. A column without splits is
    unused. requests: int32 [2, B]: the first column of each request and how many splits it has. tile: keys of
    a tile. programs: among which the batch is divided, for each key head. table_keys: keys a block table can
    hold. The rest is what it was made for.
    """

    work: torch.Tensor
    requests: torch.Tensor
    tile: int
    programs: int
    table_keys: int
    kv_heads: int
    query_len: int
    window: int | None

    @property
    def capacity(self) -> int:
        return self.work.shape[1]

    @property
    def can_split(self) -> bool:
        """False if every request has one split, whatever its length."""
        return self.capacity > self.requests.shape[1]


def empty_splits(
    lens: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    query_len: int,
    window: int | None,
    programs: int | None,
) -> DecodeSplits:
    """Splits not yet filled in, for the arguments of `decode_splits`, which are checked."""
    check_kv(kv, STORED)
    check_tables(tables)
    check_shape("lens", lens, (None,))
    check_device(kv, lens=lens, tables=tables)
    if not 1 <= query_len <= MOST_QUERIES:
        raise ValueError(f"query_len is {query_len}; it must be 1 to {MOST_QUERIES}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be 1 or more, or None")
    if programs is not None and programs < 1:
        raise ValueError(f"programs is {programs}; it must be 1 or more, or None")
    _, block_size, _, kv_heads, head_dim = kv.shape
    batch, table_width = len(lens), tables.shape[1]
    tile = tile_keys(block_size, head_dim, kv.dtype)
    programs = programs or programs_per_head(batch, kv_heads, kv.device)
    tiles = most_tiles(table_width, block_size, tile, query_len, window)
    capacity = most_splits(batch, tiles, programs)
    if capacity > MOST_SPLITS:
        raise ValueError(
            f"programs is {programs}, for which {batch} requests may have {capacity} splits; there may be up "
            f"to {MOST_SPLITS}"
        )
    return DecodeSplits(
        work=torch.empty(5, capacity, dtype=torch.int32, device=kv.device),
        requests=torch.empty(2, batch, dtype=torch.int32, device=kv.device),
        tile=tile,
        programs=programs,
        table_keys=table_width * block_size,
        kv_heads=kv_heads,
        query_len=query_len,
        window=window,
    )


def tile_keys(block_size: int, head_dim: int, dtype: torch.dtype) -> int:
    """Keys of a tile, a power of two."""
    # 8 bits are computed with as 16, which have to fit the registers.
    fits = TILE_BYTES // (power_of_two_from(head_dim) * max(dtype.itemsize, 2))
    keys = min(max(fits, SHORTEST_TILE), LONGEST_TILE)
    return block_size if SMALLEST_BLOCK <= block_size < keys else keys


def most_tiles(table_width: int, block_size: int, tile: int, query_len: int, window: int | None) -> int:
    """Tiles of the longest request its block table can hold."""
    tiles = -(-table_width * block_size // tile)
    if window is None:
        return tiles
    # The queries together see window + query_len - 1 keys, which may begin with the last key of a tile.
    return min(tiles, 1 + -(-(window + query_len - 2) // tile))


def programs_per_head(batch: int, kv_heads: int, device: torch.device) -> int:
    """Programs for each key head among which a batch is best divided: those that the device holds at once, a
    wave, or SHARES_OF_WAVES of these. Where MOST_ROWS makes several programs of one, they are not counted."""
    wave = max(multiprocessors(device) * PROGRAMS_AT_ONCE // kv_heads, 1)
    return wave if batch <= wave else round(wave * SHARES_OF_WAVES)


def most_splits(requests: int, tiles: int, programs: int) -> int:
    """Splits that `requests` requests of up to `tiles` tiles can have when `programs` fill the device.

    A request of t tiles has max(1, t // length) of them with a length of at least (sum of t) / programs and
    LEAST_SPLIT: one each, and no more than `programs` besides.
    """
    return min(requests + programs, requests * max(tiles // LEAST_SPLIT, 1))
