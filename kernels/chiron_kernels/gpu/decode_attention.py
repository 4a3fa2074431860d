"""Attention of the newest tokens over the paged pool: one token a request, or a few that were drafted.

Decoding reads every key and value once and computes little with them, so it takes as long as that reading.
What follows from it:

  * All query heads that share a key head, and all new tokens of a request, are rows of one matrix, so that
    keys are read once for all of them (GQA packing) and multiplied by the tensor cores. Of key head h

        row r = query head  h * GROUP + r % GROUP  of new token  r // GROUP

    Rows beyond MOST_ROWS are another program's.

  * The keys of a request are divided among programs so that every batch fills the device; `decode_splits`
    says how, and `merge_splits` joins the parts. This is Flash-Decoding (Dao et al. 2023) with an online
    softmax (Milakov, Gimelshein 2018, arXiv:1805.02867).

  * The next tile's entries of the block table are read one step ahead. Found in the step that needs them,
    they would take half the stages of the software pipeline.

The keys are taken in tiles of TILE, one to a step of the loop. A program is given those of its request from
`first` up to `end`. Here / are keys that count, and . are others in tiles that are read:

    keys       0               lowest                                length
    tiles      |        |......//|////////|////////|////////|////////|///.....|
    splits              '------- split 0 ----------'------- split 1 ----------'
                        first                  end = first                  end

    lowest: the first key that any of its queries sees, 0 without a window. What the outer tiles hold before
    `lowest` and from `length` on must not count: their scores are -inf. From `length` on it may even be NaN,
    and 0 * NaN is NaN, so that the values there must be 0. `pool_tiles` sees to that.

Each new token sees the keys up to its own. With 3 new tokens (QUERY_LEN), a GROUP of 2 and 6 keys:

    row    token  head    keys 0 1 2 3 4 5
    0, 1   0      0, 1         x x x x . .      position 3 = length - QUERY_LEN + token
    2, 3   1      0, 1         x x x x x .
    4, 5   2      0, 1         x x x x x x
    6 ...  -      -       not in use: they compute with queries of 0, and nothing of them is stored

What comes out is normalised by the sum of the split's own softmax, and stored with the logarithm of that sum:
where the request has one split in `out` and `lse`, where the logarithm is the natural one, else at the
split's place in `partial` and `partial_lse`, where it is to the base 2, to be joined.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.base_two import LN_2, LOG2_E, LOWEST
from chiron_kernels.gpu.checks import check_shape
from chiron_kernels.gpu.decode_checks import check_decode, check_results
from chiron_kernels.gpu.decode_plan import DecodeSplits
from chiron_kernels.gpu.eight_bits import check_scales, check_target
from chiron_kernels.gpu.launch import Launch, power_of_two_from
from chiron_kernels.gpu.merge_splits import merge_splits_launch
from chiron_kernels.gpu.paged_kv import EIGHT_BITS, FEWEST_COLUMNS
from chiron_kernels.gpu.pool_tiles import inside_tile, load_tile, look_up, tile_descriptor, tile_loads

FEWEST_ROWS = 16
"""Of queries: a matrix instruction has 16 rows, used or not."""

MOST_ROWS = 64
"""Of a program: with heads of 256 the sums of twice as many are half the registers of a multiprocessor. More
rows are several programs, of which all but one find the keys in the cache."""

SUMS_FOR_8_WARPS = MOST_ROWS * 256
"""Rows times columns: half of all registers that 4 warps can have, which need many beside the sums."""

BYTES_AHEAD = 65536
"""Of keys and values that a program has under way: with one to three programs on each multiprocessor, more
than the 20 to 40 KiB that it takes to cover the latency of the memory at its full rate."""

MOST_STAGES = 5
"""Of the pipeline. Of small tiles (small heads, small blocks, 8 bits) BYTES_AHEAD would be more, but four
under way in each of three programs cover the latency from 4 KiB on."""


# Not specialised: numbers that vary while serving and that no alignment follows from.
@triton.jit(do_not_specialize=["capacity", "table_stride", "table_keys", "window"])
def _decode_attention(
    q,  # [B * QUERY_LEN, KV_HEADS * GROUP, D], rows q_stride apart
    kv,  # [num_blocks, BLOCK_SIZE, 2, KV_HEADS, D], blocks block_stride apart, or a descriptor of that
    tables,  # int64 [S, W] block ids, rows table_stride apart
    table_rows,  # int64 [B]
    lens,  # int64 [B]
    sinks,  # [KV_HEADS * GROUP], read if SINKS
    work,  # int32 [5, capacity], see DecodeSplits
    out,  # [B * QUERY_LEN, KV_HEADS * GROUP, D] out, of requests with one split
    lse,  # float32 [B * QUERY_LEN, KV_HEADS * GROUP] out, likewise, if LSE
    partial,  # float32 [capacity, KV_HEADS, QUERY_LEN * GROUP, D] out, of the other requests
    partial_lse,  # float32 [capacity, KV_HEADS, QUERY_LEN * GROUP] out, likewise, to the base 2
    capacity,
    q_stride,
    block_stride,
    table_stride,
    table_keys,  # keys a row of `tables` can hold
    scale,  # of the scores; times log2(e) unless SOFTCAP
    v_scale,  # of the values
    softcap,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,  # the power of two from D up
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    LOADS: tl.constexpr,
    FROM_8_BITS: tl.constexpr,  # keys and values are float8_e4m3fn, computed with as float16
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
):
    # The split, from its column of the work list. Programs of one split follow one another: they read the
    # same tokens, whose heads lie side by side.
    ROW_TILES: tl.constexpr = (QUERY_LEN * GROUP + ROWS - 1) // ROWS
    head = tl.program_id(0) // ROW_TILES
    row = tl.program_id(0) % ROW_TILES * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    request = tl.load(work + split).to(tl.int64)
    place = tl.load(work + capacity + split)  # among the splits of the request
    splits = tl.load(work + 2 * capacity + split)
    first = tl.load(work + 3 * capacity + split)
    end = tl.load(work + 4 * capacity + split)
    if splits == 0:  # the column is not used
        return

    table = tables + tl.load(table_rows + request) * table_stride
    length = tl.minimum(tl.load(lens + request), table_keys).to(tl.int32)
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(length - QUERY_LEN - window + 1, 0)

    # The rows: their queries, and what each of them sees.
    in_use = row < QUERY_LEN * GROUP
    query = row // GROUP
    query_head = head * GROUP + row % GROUP
    query_row = request * QUERY_LEN + query
    position = length - QUERY_LEN + query  # of the newest key that a row sees; before 0 it sees none
    column = tl.arange(0, COLUMNS)
    valid = in_use[:, None] & (column < D)[None, :]
    queries = tl.load(q + (query_row * q_stride + query_head * D)[:, None] + column[None, :], valid, 0.0)
    if FROM_8_BITS:
        queries = queries.to(tl.float16)

    # The online softmax, to the base 2: the highest score so far, the sum of 2^(score - highest), and the
    # same sum with values. A sink is one more score, of a key without a value, before the first one of the
    # request: the first split has it.
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        sink = tl.load(sinks + query_head, in_use, 0.0).to(tl.float32) * LOG2_E
        # A sink may be -inf. One that is NaN makes NaN of its rows.
        sink = tl.maximum(sink, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        highest = tl.where(place == 0, sink, highest)
        total = tl.where(place == 0, 1.0, total)
    values = tl.zeros([ROWS, COLUMNS], tl.float32)

    # A request without keys has an empty split at tile 0, whose look-up reads its table's first entry, for
    # nothing: tables are one block wide at least.
    inside = inside_tile(first * TILE, lowest, length, TILE)
    block = look_up(table, first * TILE, inside, BLOCK_SIZE, TILE, LOADS)
    for tile in tl.range(first, end):
        start = tile * TILE
        if LOADS == "descriptor":
            # back: keys the last box would read past the end. It ends with the last key instead, so that
            # key < length holds of itself; what it has before `start` counts with the tile before. origin,
            # the box's first token in the block, may be below 0, where zeros are read: see `pool_tiles`.
            back = tl.maximum(start + TILE - length, 0)
            key = start - back + tl.arange(0, TILE)
            inside = key >= tl.maximum(start, lowest)
            origin = start % BLOCK_SIZE - back
        else:
            key = start + tl.arange(0, TILE)
            inside = inside_tile(start, lowest, length, TILE)
            origin = start
        k, v = load_tile(
            kv, block, origin, inside, head, block_stride, KV_HEADS, D, COLUMNS, BLOCK_SIZE, TILE, LOADS
        )
        if FROM_8_BITS:
            k, v = k.to(tl.float16), v.to(tl.float16)
        # The last step looks its own entries up again, as there may be none after them.
        next_start = tl.minimum(tile + 1, end - 1) * TILE
        next_inside = inside_tile(next_start, lowest, length, TILE)
        block = look_up(table, next_start, next_inside, BLOCK_SIZE, TILE, LOADS)

        # ieee: float32 is not rounded to TF32. For 16 bits it makes no difference.
        score = tl.dot(queries, k.T, input_precision="ieee") * scale
        if SOFTCAP:
            # softcap * tanh(score / softcap), with tanh(x) = 1 - 2 / (1 + e^2x), and to the base 2.
            tanh = 1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * LOG2_E / softcap)))
            score = (softcap * LOG2_E) * tanh
        if QUERY_LEN == 1:
            seen = inside[None, :]
        else:
            seen = inside[None, :] & (key[None, :] <= position[:, None])
            if WINDOWED:
                seen = seen & (key[None, :] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))

        # 2^(-inf - higher) is 0: what is not seen does not count, and of a row that has seen nothing yet the
        # sums stay 0.
        higher = tl.maximum(highest, tl.max(score, axis=1))
        probability = tl.exp2(score - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(probability, axis=1)
        values = values * fade[:, None]
        values = tl.dot(probability.to(v.dtype), v, values, input_precision="ieee")
        highest = higher

    # A row may see no key of the split: its result is 0 then, and so is its weight in what is joined. A sum
    # that is no number is not 0: it shows.
    some = tl.where(total != 0.0, total, 1.0)
    result = values * (v_scale / some)[:, None]
    log_sum = tl.where(total != 0.0, highest + tl.log2(some), float("-inf"))
    if splits == 1:
        target = query_row * (KV_HEADS * GROUP) + query_head
        tl.store(out + target[:, None] * D + column[None, :], result.to(out.dtype.element_ty), valid)
        if LSE:
            # Without keys there is no softmax, whatever the sink.
            tl.store(lse + target, tl.where(position < 0, float("-inf"), log_sum * LN_2), in_use)
    else:
        target = (split.to(tl.int64) * KV_HEADS + head) * (QUERY_LEN * GROUP) + row
        tl.store(partial + target[:, None] * D + column[None, :], result, valid)
        tl.store(partial_lse + target, log_sum, in_use)


def decode_attention_launch(
    q: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    table_rows: torch.Tensor,
    lens: torch.Tensor,
    splits: DecodeSplits,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    query_len: int,
    lse: torch.Tensor | None,
    k_scale: float,
    v_scale: float,
    out: torch.Tensor,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
) -> Launch:
    """out: like q, contiguous, written for requests with one split; partial and partial_lse: see
    `merge_splits`, written for the others. Otherwise as `decode_attention`."""
    check_decode(q, kv, tables, table_rows, lens, splits, window, softcap, sinks, query_len, lse)
    check_results(q, splits, out, partial, partial_lse)
    check_target(kv)
    check_scales(k_scale, v_scale)
    _, block_size, _, kv_heads, head_dim = kv.shape
    group = q.shape[1] // kv_heads
    columns = max(power_of_two_from(head_dim), FEWEST_COLUMNS)
    tile_rows = min(max(power_of_two_from(group * query_len), FEWEST_ROWS), MOST_ROWS)
    loads = tile_loads(kv, splits.tile)
    score_scale = scale * k_scale
    # Pointers that are not read, without SINKS or LSE, are given as any tensor's.
    return Launch(
        _decode_attention,
        (kv_heads * -(-group * query_len // tile_rows), splits.capacity),
        {
            "q": q,
            "kv": tile_descriptor(kv, splits.tile, columns) if loads == "descriptor" else kv,
            "tables": tables,
            "table_rows": table_rows,
            "lens": lens,
            "sinks": lens if sinks is None else sinks,
            "work": splits.work,
            "out": out,
            "lse": partial_lse if lse is None else lse,
            "partial": partial,
            "partial_lse": partial_lse,
            "capacity": splits.capacity,
            "q_stride": q.stride(0),
            "block_stride": kv.stride(0),
            "table_stride": tables.stride(0),
            "table_keys": splits.table_keys,
            "scale": score_scale if softcap is not None else score_scale * LOG2_E.value,
            "v_scale": v_scale,
            "softcap": softcap or 0.0,
            # One beyond the table is no window; much beyond, it would overflow in the kernel.
            "window": min(window or 0, splits.table_keys),
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "QUERY_LEN": query_len,
            "D": head_dim,
            "COLUMNS": columns,
            "BLOCK_SIZE": block_size,
            "ROWS": tile_rows,
            "TILE": splits.tile,
            "LOADS": loads,
            "FROM_8_BITS": kv.dtype == EIGHT_BITS,
            "WINDOWED": window is not None,
            "SOFTCAP": softcap is not None,
            "SINKS": sinks is not None,
            "LSE": lse is not None,
        },
        num_warps=8 if tile_rows * columns >= SUMS_FOR_8_WARPS else 4,
        num_stages=_stages(2 * splits.tile * columns * kv.itemsize),
    )


def _stages(tile_bytes: int) -> int:
    """Of the pipeline, of which all but one are under way, for so many bytes of keys and values a tile."""
    return min(1 + BYTES_AHEAD // tile_bytes, MOST_STAGES)


def decode_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    table_rows: torch.Tensor,
    lens: torch.Tensor,
    splits: DecodeSplits,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    query_len: int = 1,
    lse: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v of the newest query_len tokens of each request: [B * query_len, Hq, D].

    q: [B * query_len, Hq, D], the tokens of a request one after another, heads dense, rows any stride apart.
    kv: [num_blocks, block_size, 2, Hkv, D], a layer of the pool, in which the new tokens are already;
    block_size a power of two. Its dtype is that of q, or float8_e4m3fn for q of float16 or bfloat16; then q
    is computed with as float16, so below 65504. Query head h reads key head h // (Hq / Hkv). tables: int64
    [S, W], the block tables of all slots, and table_rows: int64 [B], the slot of each request; these and the
    block ids must be in range, which only the device could check. lens: int64 [B], keys of each request, its
    new tokens included: query j of query_len sees keys 0 to lens - query_len + j. splits: of
    `decode_splits` for the same lens and geometry.

    window: each query sees its last `window` keys, itself included. softcap: scores become
    softcap * tanh(score / softcap). sinks: [Hq], for each head one more score in the softmax's sum. lse:
    float32 [B * query_len, Hq], written: the natural logarithm of that sum. A query without keys has zeros
    and -inf. k_scale, v_scale: keys and values are so many times what the pool holds. out: what to write to
    and return, contiguous, as q; a new tensor where not given. Raises ValueError for what does not fit.
    """
    check_shape("q", q, (None, None, None))
    rows = q.shape[1] // splits.kv_heads * splits.query_len
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial = q.new_empty(splits.capacity, splits.kv_heads, rows, q.shape[2], dtype=torch.float32)
    partial_lse = partial.new_empty(partial.shape[:3])
    decode_attention_launch(
        q, kv, tables, table_rows, lens, splits, scale, window, softcap, sinks, query_len, lse,
        k_scale, v_scale, out, partial, partial_lse,
    ).run()  # fmt: skip
    if splits.can_split:
        merge_splits_launch(partial, partial_lse, splits, out, lse).run()
    return out
