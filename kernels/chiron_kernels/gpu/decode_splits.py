"""Dividing the keys of a decode step among programs, on the device.

Lengths change with every step and stay on the device, where this kernel reads them: nothing waits for the
host, and a CUDA graph that was captured once serves all lengths. All layers with the same key heads, head
size and window share its result.

One length of a split serves the whole batch, so that no program has twice as much to do, be its request long
or short. It is such that all splits together are as many as `programs`:

    length = max(ceil(sum of tiles / programs), LEAST_SPLIT)
    splits of a request = max(its tiles // length, 1)

Rounded down, the splits exceed `programs` only by requests that have one, so that no batch has a few
programs left to run after the others. Flash-Decoding (Dao, Haziza, Massa, Sizov 2023) splits all requests
alike; Stream-K (Osama et al. 2023, arXiv:2301.03598) divides the sum of work as is done here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.checks import check_contiguous, check_device, check_dtype, check_shape
from chiron_kernels.gpu.decode_plan import LEAST_SPLIT, DecodeSplits, empty_splits
from chiron_kernels.gpu.launch import Launch

MOST_REQUESTS = 2**15
"""With the splits besides one each, the second axis of a grid, 65,535, still holds all."""

REQUESTS = 256
"""Counted at once by each program, whatever the batch: one kernel serves all."""

STEP = 128
"""Columns of `work` written at once: one for each thread."""


@triton.jit
def _tiles(
    lens,
    base,
    batch,
    table_keys,
    window,
    QUERY_LEN: tl.constexpr,
    WINDOWED: tl.constexpr,
    TILE: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """int32 [REQUESTS]: the first tile and the number of tiles of requests `base` and on; none past B."""
    index = base + tl.arange(0, REQUESTS)
    # A length that the table cannot hold would have the attention read beyond it.
    keys = tl.load(lens + index, mask=index < batch, other=0)
    keys = tl.minimum(tl.maximum(keys, 0), table_keys).to(tl.int32)
    first = tl.zeros_like(keys)
    if WINDOWED:
        # The first query is at keys - QUERY_LEN and sees `window` keys up to its own.
        first = tl.maximum(keys - QUERY_LEN - window + 1, 0) // TILE
    return first, tl.cdiv(keys, TILE) - first


# Not specialised: numbers that vary while serving and that no alignment follows from.
@triton.jit(do_not_specialize=["batch", "capacity", "table_keys", "window", "programs"])
def _decode_splits(
    lens,  # int64 [B]
    work,  # int32 [5, capacity] out
    requests,  # int32 [2, B] out
    batch,  # B
    capacity,
    table_keys,  # keys a block table can hold
    window,
    programs,  # for each key head
    QUERY_LEN: tl.constexpr,
    WINDOWED: tl.constexpr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,  # tiles of the shortest split
    REQUESTS: tl.constexpr,  # counted at once
    STEP: tl.constexpr,  # columns of `work` written at once
):
    """One program for each request: it finds the splits of all, which is quick, and writes its own."""
    request = tl.program_id(0)
    total = tl.zeros((), tl.int64)
    for base in range(0, batch, REQUESTS):
        _, tiles = _tiles(lens, base, batch, table_keys, window, QUERY_LEN, WINDOWED, TILE, REQUESTS)
        total += tl.sum(tiles.to(tl.int64), axis=0)
    length = tl.maximum(tl.cdiv(total, programs), LEAST).to(tl.int32)

    start = tl.zeros((), tl.int32)
    own_first = tl.zeros((), tl.int32)
    own_tiles = tl.zeros((), tl.int32)
    for base in range(0, request + 1, REQUESTS):
        first, tiles = _tiles(lens, base, batch, table_keys, window, QUERY_LEN, WINDOWED, TILE, REQUESTS)
        index = base + tl.arange(0, REQUESTS)
        start += tl.sum(tl.where(index < request, tl.maximum(tiles // length, 1), 0), axis=0)
        own_first += tl.sum(tl.where(index == request, first, 0), axis=0)
        own_tiles += tl.sum(tl.where(index == request, tiles, 0), axis=0)
    own_splits = tl.maximum(own_tiles // length, 1)
    tl.store(requests + request, start)
    tl.store(requests + batch + request, own_splits)

    # The last request also marks the columns after its own as unused: no splits.
    stop = tl.where(request == batch - 1, capacity, start + own_splits)
    for from_column in tl.range(start, stop, STEP):
        column = from_column + tl.arange(0, STEP)
        place = column - start
        used = place < own_splits
        written = column < stop
        tl.store(work + column, request, mask=written)
        tl.store(work + capacity + column, place, mask=written)
        tl.store(work + 2 * capacity + column, tl.where(used, own_splits, 0), mask=written)
        # Tiles are dealt out evenly: no two splits of a request differ by more than one.
        begins = own_first + (place.to(tl.int64) * own_tiles // own_splits).to(tl.int32)
        ends = own_first + ((place.to(tl.int64) + 1) * own_tiles // own_splits).to(tl.int32)
        tl.store(work + 3 * capacity + column, begins, mask=written)
        tl.store(work + 4 * capacity + column, ends, mask=written)


def decode_splits_launch(lens: torch.Tensor, splits: DecodeSplits) -> Launch:
    """splits: of `empty_splits`; work and requests are written."""
    batch = splits.requests.shape[1]
    check_shape("lens", lens, (batch,))
    check_dtype("lens", lens, (torch.int64,))
    check_contiguous("lens", lens)
    check_device(splits.work, lens=lens)
    if batch > MOST_REQUESTS:
        raise ValueError(f"lens has {batch} requests; there may be up to {MOST_REQUESTS}")
    return Launch(
        _decode_splits,
        (batch,),
        {
            "lens": lens,
            "work": splits.work,
            "requests": splits.requests,
            "batch": batch,
            "capacity": splits.capacity,
            "table_keys": splits.table_keys,
            # One beyond the table is no window; much beyond, it would overflow in the kernel.
            "window": min(splits.window or 0, splits.table_keys),
            "programs": splits.programs,
            "QUERY_LEN": splits.query_len,
            "WINDOWED": splits.window is not None,
            "TILE": splits.tile,
            "LEAST": LEAST_SPLIT,
            "REQUESTS": REQUESTS,
            "STEP": STEP,
        },
        num_stages=1,
    )


def decode_splits(
    lens: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    query_len: int = 1,
    window: int | None = None,
    programs: int | None = None,
) -> DecodeSplits:
    """How `decode_attention` divides a step over the keys of a batch.

    lens: int64 [B], keys of each request, its own query_len new tokens included; one beyond what a block
    table holds counts as that. kv: a layer of the pool, tables: [S, W]; only their shapes, dtype and device
    count. query_len: 1 to 8. window: keys that a query sees, itself included. programs: as many for each
    key head fill the device; None for what it is known to hold. Raises ValueError for what does not fit.
    """
    splits = empty_splits(lens, kv, tables, query_len, window, programs)
    decode_splits_launch(lens, splits).run()
    return splits
