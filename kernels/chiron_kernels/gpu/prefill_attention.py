"""Attention of chunks of prompts over the paged keys and values, each row seeing what is before it.

A program takes one block of packed rows (see `query_blocks`) of one key head and goes over the keys in
tiles, keeping a running maximum, sum and weighted values (FlashAttention-2, Dao 2023, arXiv:2307.08691,
algorithm 1).

Packed rows. The G query heads of a key head are G rows for every token. A block of 128 such rows spans
128 / G tokens, so a short chunk still fills a block, each key that is loaded serves all G heads, and the
diagonal, where half the scores are thrown away, is G times shorter than with one head to a block.

Which tiles. Let a block's tokens be at positions first .. last, and the window hold w keys:

    keys    0        first - w + 1    last - w + 1             first      last
            |  never seen  |   masked   |       unmasked         |  masked  |
    tiles                  ^ seen_from  ^ full_from     full_to  ^          ^ seen_to

Tiles between full_from and full_to, nearly all, are seen whole by every row and need no mask. Only masked
tiles can reach keys that are no part of the request (freed by the window, or after its last token); there
they are not loaded, and count as zeros.

Splits. Where there are too few blocks to fill the GPU, each block's tiles are dealt to several programs,
whose partial results `merge_parts` joins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from chiron_kernels.gpu.base_two import LN_2, LOG2_E, LOWEST
from chiron_kernels.gpu.checks import check_dtype
from chiron_kernels.gpu.eight_bits import check_scales, check_target
from chiron_kernels.gpu.launch import Launch, power_of_two_from, target_architecture
from chiron_kernels.gpu.merge_parts import MOST_SPLITS, merge_parts_launch
from chiron_kernels.gpu.multiprocessors import multiprocessors
from chiron_kernels.gpu.paged_kv import EIGHT_BITS, FEWEST_COLUMNS
from chiron_kernels.gpu.prefill_plan import (
    PrefillShape,
    check_arguments,
    check_out,
    choose_splits,
    tiling,
)
from chiron_kernels.gpu.prefill_tiles import attend_tiles
from chiron_kernels.gpu.query_blocks import QueryBlocks

Inputs = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, QueryBlocks, float
]
"""q, kv, tables, table_rows, query_starts, context_lens, blocks, scale."""


@triton.jit(
    do_not_specialize=["tokens", "table_width"],
    do_not_specialize_on_alignment=["table_rows", "query_starts", "context_lens"],
)
def _prefill_attention(
    q,  # [T, Hq, HEAD_DIM]
    kv,  # keys and values of a layer, [num_blocks, BLOCK, 2, Hkv, HEAD_DIM]
    pages,  # tensor descriptor of kv, None unless BY_TENSOR
    tables,  # int64 [S, W]
    table_rows,  # int64 [C]
    query_starts,  # int64 [C + 1]
    context_lens,  # int64 [C]
    entries,  # int32 [N, 2]
    count,  # int32 [1]
    sinks,  # [Hq], not read unless HAS_SINKS
    out,  # [T, Hq, HEAD_DIM]; with SPLIT float32 [splits, T, Hq, HEAD_DIM]
    lse,  # float32 [T, Hq], not written unless HAS_LSE; with SPLIT [splits, T, Hq], in units of log 2
    tokens,  # T
    table_width,  # W
    q_stride,  # elements from row to row
    table_stride,
    block_stride,
    token_stride,
    value_offset,  # from a token's keys to its values
    cap_scale,  # scale / softcap, with HAS_CAP
    unit,  # what a score, or tanh of a capped one, is multiplied with: positive, log2(e) included
    window,  # keys a row sees, itself included; with HAS_WINDOW
    v_scale,  # of the values
    BY_TENSOR: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr,  # else every row sees the context and nothing after it
    GROUP: tl.constexpr,  # query heads of a key head
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # the power of two from HEAD_DIM up
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (i, h, s): block i, key head h, split s. Programs that run side by side share a head, whose
    keys then stay in the cache."""
    index = tl.program_id(0)
    if index >= tl.load(count):
        return
    head = tl.program_id(1)
    split = tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    chunk = tl.load(entries + index * 2)
    first_row = tl.load(entries + index * 2 + 1)
    start = tl.load(query_starts + chunk)
    length = (tl.minimum(tl.load(query_starts + chunk + 1), tokens) - start).to(tl.int32)
    context = tl.load(context_lens + chunk).to(tl.int32)
    table = tables + tl.load(table_rows + chunk) * table_stride

    # Rows of the block, and where each lies in q.
    row = first_row + tl.arange(0, ROWS)
    token = row // GROUP
    exists = token < length
    position = context + token
    if not CAUSAL:
        position = tl.full([ROWS], 0, tl.int32) + (context - 1)
    q_head = head * GROUP + row % GROUP
    dim = tl.arange(0, DIM)
    within = exists[:, None] & (dim < HEAD_DIM)[None, :]
    q_row = q + (start + token) * q_stride + q_head * HEAD_DIM
    q_tile = tl.load(q_row[:, None] + dim[None, :], mask=within, other=0.0)

    # Tiles of the block, as drawn above, and this split's part of them.
    first = context + first_row // GROUP
    last = context + tl.minimum((first_row + ROWS - 1) // GROUP, length - 1)
    if not CAUSAL:
        first = context - 1
        last = context - 1
    seen_end = tl.minimum(last + 1, table_width * BLOCK)
    seen_from = 0
    if HAS_WINDOW:
        seen_from = tl.maximum(first - window + 1, 0)
    tile_from = seen_from // TILE
    tile_to = tl.cdiv(seen_end, TILE)
    if SPLIT:
        share = tl.cdiv(tile_to - tile_from, tl.num_programs(2))
        split_from = tile_from + split * share
        tile_to = tl.minimum(split_from + share, tile_to)
        tile_from = tl.minimum(split_from, tile_to)
    full_from = tile_from
    if HAS_WINDOW:
        full_from = tl.cdiv(tl.maximum(last - window + 1, 0), TILE)
        full_from = tl.minimum(tl.maximum(full_from, tile_from), tile_to)
    full_to = tl.maximum(tl.minimum((first + 1) // TILE, tile_to), full_from)

    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        # As a first key with this score and no value, in the first split alone.
        sink = tl.load(sinks + q_head, mask=exists, other=0.0).to(tl.float32) * LOG2_E
        # A sink may be -inf. One that is NaN makes NaN of its rows.
        sink = tl.maximum(sink, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        highest = tl.where(split == 0, sink, highest)
        total = tl.where(split == 0, 1.0, total)
    state = (tl.zeros([ROWS, DIM], tl.float32), highest, total)
    seen = (seen_from, seen_end)
    head_kv = kv + head * HEAD_DIM
    paging = (table, head, block_stride, token_stride, value_offset)
    scoring = (cap_scale, unit, window)
    if HAS_WINDOW:
        state = attend_tiles(
            state, q_tile, position, tile_from, full_from, seen, head_kv, pages, paging, scoring,
            True, False, HAS_CAP, HAS_WINDOW, HEAD_DIM, DIM, BLOCK, TILE, EIGHT_BITS, 1,
        )  # fmt: skip
    state = attend_tiles(
        state, q_tile, position, full_from, full_to, seen, head_kv, pages, paging, scoring,
        False, BY_TENSOR, HAS_CAP, HAS_WINDOW, HEAD_DIM, DIM, BLOCK, TILE, EIGHT_BITS, STAGES,
    )  # fmt: skip
    state = attend_tiles(
        state, q_tile, position, full_to, tile_to, seen, head_kv, pages, paging, scoring,
        True, False, HAS_CAP, HAS_WINDOW, HEAD_DIM, DIM, BLOCK, TILE, EIGHT_BITS, 1,
    )  # fmt: skip
    acc, highest, total = state

    # A row may see nothing of its split: then log2 of 0 is all that is stored. A sum that is no number is not
    # 0: such a row is stored as what it is.
    at = (start + token) * heads + q_head
    some = total != 0
    total = tl.where(some, total, 1.0)
    log_sum = tl.where(some, highest + tl.log2(total), float("-inf"))
    if SPLIT:
        at += split.to(tl.int64) * tokens * heads
        tl.store(lse + at, log_sum, mask=exists)
    elif HAS_LSE:
        tl.store(lse + at, log_sum * LN_2, mask=exists)
    result = (acc * (v_scale / total)[:, None]).to(out.dtype.element_ty)
    stored = (exists & some)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(out + (at * HEAD_DIM)[:, None] + dim[None, :], result, mask=stored)


def _launch(
    shape: PrefillShape,
    inputs: Inputs,
    out: torch.Tensor,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None,
    sums: torch.Tensor | None,
    k_scale: float,
    v_scale: float,
    causal: bool,
) -> Launch:
    """As `prefill_attention_launch`, its arguments but out and sums checked."""
    q, kv, tables, table_rows, query_starts, context_lens, blocks, scale = inputs
    check_out(q, kv, out, sums)
    check_target(kv)
    check_scales(k_scale, v_scale)
    architecture = target_architecture()
    tile = tiling(shape, blocks.rows, kv, architecture, causal)
    dim = max(power_of_two_from(shape.head_dim), FEWEST_COLUMNS)
    score_scale = scale * k_scale
    pages = None
    if tile.by_tensor:
        pages = TensorDescriptor(kv, list(kv.shape), list(kv.stride()), [1, tile.keys, 1, 1, dim])
    return Launch(
        _prefill_attention,
        (blocks.entries.shape[0], shape.kv_heads, 1 if sums is None else sums.shape[0]),
        {
            "q": q,
            "kv": kv,
            "pages": pages,
            "tables": tables,
            "table_rows": table_rows,
            "query_starts": query_starts,
            "context_lens": context_lens,
            "entries": blocks.entries,
            "count": blocks.count,
            "sinks": q if sinks is None else sinks,
            "out": out,
            "lse": next((tensor for tensor in (sums, lse) if tensor is not None), out),
            "tokens": shape.tokens,
            "table_width": tables.shape[1],
            "q_stride": q.stride(0),
            "table_stride": tables.stride(0),
            "block_stride": kv.stride(0),
            "token_stride": kv.stride(1),
            "value_offset": kv.stride(2),
            "cap_scale": 0.0 if softcap is None else score_scale / softcap,
            "unit": (score_scale if softcap is None else softcap) * LOG2_E.value,
            "window": 0 if window is None else window,
            "v_scale": v_scale,
            "BY_TENSOR": tile.by_tensor,
            "HAS_CAP": softcap is not None,
            "HAS_WINDOW": window is not None,
            "HAS_SINKS": sinks is not None,
            "HAS_LSE": lse is not None and sums is None,
            "SPLIT": sums is not None,
            "CAUSAL": causal,
            "GROUP": shape.group,
            "HEAD_DIM": shape.head_dim,
            "DIM": dim,
            "BLOCK": shape.block_size,
            "ROWS": blocks.rows,
            "TILE": tile.keys,
            "EIGHT_BITS": kv.dtype == EIGHT_BITS,
            "STAGES": tile.stages,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=tile.registers,
    )


def prefill_attention_launch(
    q: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    table_rows: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    blocks: QueryBlocks,
    scale: float,
    out: torch.Tensor,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    causal: bool = True,
) -> Launch:
    """q is float16 for a pool of 8 bits. Converted in the kernel, it would stay in registers for all tiles;
    as it was loaded, the products read it from shared memory.

    Without sums, out is [T, Hq, D] as q, or float16 or bfloat16 for a pool of 8 bits, and lse as in
    `prefill_attention`, written. With sums, float32 [P, T, Hq], the keys are dealt to P splits: out is
    float32 [P, T, Hq, D], both are written for `merge_parts_launch`, and lse is left alone. Otherwise as
    `prefill_attention`."""
    inputs = (q, kv, tables, table_rows, query_starts, context_lens, blocks, scale)
    shape = check_arguments(*inputs, window, softcap, sinks, lse, causal)
    if kv.dtype == EIGHT_BITS:
        check_dtype("q", q, (torch.float16,))
    return _launch(shape, inputs, out, window, softcap, sinks, lse, sums, k_scale, v_scale, causal)


def prefill_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    table_rows: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    blocks: QueryBlocks,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    max_len: int | None = None,
    splits: int | None = None,
    out: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    causal: bool = True,
) -> torch.Tensor:
    """Each row's softmax-weighted mean of the values it sees: [T, Hq, D], as q.

    q: [T, Hq, D], the rows of C chunks one after another, each row dense; float16, bfloat16 or float32. kv: a
    layer of the pool, [num_blocks, block_size, 2, Hkv, D], see `paged_kv`; query head h reads key head
    h // (Hq / Hkv). Its dtype is that of q, or float8_e4m3fn for q of float16 or bfloat16; then q is computed
    with as float16, so below 65504. tables: int64 [S, W], block ids, and table_rows: int64 [C], which row is
    each chunk's. query_starts: int64 [C + 1], chunk c has rows query_starts[c] .. query_starts[c + 1] - 1;
    rows in no chunk are not written. context_lens: int64 [C], keys before the chunk's first row; row i of the
    chunk sees keys 0 .. context_lens[c] + i, its own included, all of which are in the pool. blocks: of
    `query_blocks` with T tokens and this Hq / Hkv and D. scale: what scores are multiplied with, above 0.

    window: how many keys a row sees at most, the last ones, itself included. softcap c: a score becomes
    c tanh(score / c). sinks: [Hq], a score that joins the softmax's sum and has no value. lse: float32
    [T, Hq], written: the natural logarithm of the softmax's sum, sinks included. k_scale, v_scale: keys and
    values are so many times what the pool holds.

    max_len: no chunk's context and tokens are more; by the width of the tables where not given. splits: into
    how many parts the keys are split for programs that work side by side; by the shapes where not given. out:
    what to write to and return, contiguous, as q; a new tensor where not given. causal: False where every row
    of a chunk sees keys 0 .. context_lens[c] - 1, one at least, and no others; then without a window. Raises
    ValueError for what does not fit.
    """
    inputs = (q, kv, tables, table_rows, query_starts, context_lens, blocks, scale)
    shape = check_arguments(*inputs, window, softcap, sinks, lse, causal)
    if splits is None:
        capacity, width = blocks.entries.shape[0], tables.shape[1]
        splits = choose_splits(shape, capacity, width, max_len, window, multiprocessors(q.device))
    if not 1 <= splits <= MOST_SPLITS:
        raise ValueError(f"splits is {splits}; it must be 1 to {MOST_SPLITS}")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check_out(q, kv, out, None)
    if kv.dtype == EIGHT_BITS:
        inputs = (q.to(torch.float16), *inputs[1:])
    if splits == 1:
        _launch(shape, inputs, out, window, softcap, sinks, lse, None, k_scale, v_scale, causal).run()
        return out
    partial = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
    sums = torch.empty(splits, *q.shape[:2], dtype=torch.float32, device=q.device)
    _launch(shape, inputs, partial, window, softcap, sinks, None, sums, k_scale, v_scale, causal).run()
    merge_parts_launch(partial, sums, query_starts, out, lse).run()
    return out
