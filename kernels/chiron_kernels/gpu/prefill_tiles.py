"""The inner loop of the prefill attention: a block of rows over a run of tiles of keys and values.

`prefill_attention` says which tiles these are, and divides by the sum of the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _block_ids(table, tile, seen_end, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """int64: the block of a tile, or of each of its keys where blocks are smaller. Keys from `seen_end` on
    get block 0: the table may end there."""
    if BLOCK >= TILE:
        return tl.load(table + tile * TILE // BLOCK, mask=tile * TILE < seen_end, other=0)
    else:
        key = tile * TILE + tl.arange(0, TILE)
        return tl.load(table + key // BLOCK, mask=key < seen_end, other=0)


@triton.jit
def _load_rows(at, seen, dim, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """[TILE, DIM] at `at`: zeros beyond HEAD_DIM and, with MASKED, for keys that are not `seen`."""
    if MASKED:
        return tl.load(at, mask=seen[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif DIM > HEAD_DIM:
        return tl.load(at, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def attend_tiles(
    state,  # float32, so far: the weighted values [ROWS, DIM], the highest score in units of log 2 [ROWS],
    # the sum of the weights [ROWS]
    q_tile,  # [ROWS, DIM]
    position,  # int32 [ROWS]
    tile_from,
    tile_to,
    seen,  # from and end of the keys that any row of the block sees
    kv,  # keys of the head in block 0
    pages,
    paging,  # table, head, block_stride, token_stride, value_offset
    scoring,  # cap_scale, unit, window
    MASKED: tl.constexpr,
    BY_TENSOR: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    EIGHT_BITS: tl.constexpr,  # keys and values are, which are computed with as float16, as q_tile is
    STAGES: tl.constexpr,
):
    """The state after tiles tile_from .. tile_to - 1, which every row sees whole unless MASKED."""
    acc, highest, total = state
    seen_from, seen_end = seen
    table, head, block_stride, token_stride, value_offset = paging
    cap_scale, unit, window = scoring
    dim = tl.arange(0, DIM)
    # The next tile's block is looked up a tile early. Looked up where it is needed, the software pipeline
    # would spend every other stage on waiting for it.
    ids = _block_ids(table, tile_from, seen_end, BLOCK, TILE)
    for tile in tl.range(tile_from, tile_to, num_stages=STAGES):
        next_ids = _block_ids(table, tile + 1, seen_end, BLOCK, TILE)
        key = tile * TILE + tl.arange(0, TILE)
        if BY_TENSOR:
            page = ids.to(tl.int32)
            slot = tile * TILE % BLOCK
            keys = pages.load([page, slot, 0, head, 0]).reshape(TILE, DIM)
            values = pages.load([page, slot, 1, head, 0]).reshape(TILE, DIM)
        else:
            offset = ids * block_stride + (key % BLOCK) * token_stride
            at = kv + offset[:, None] + dim[None, :]
            exists = (key >= seen_from) & (key < seen_end)
            keys = _load_rows(at, exists, dim, MASKED, HEAD_DIM, DIM)
            values = _load_rows(at + value_offset, exists, dim, MASKED, HEAD_DIM, DIM)
        if EIGHT_BITS:
            keys = keys.to(tl.float16)
        score = tl.dot(q_tile, tl.trans(keys), input_precision="ieee")
        if HAS_CAP:
            score = 2 * tl.sigmoid(2 * cap_scale * score) - 1  # tanh of cap_scale times score
        if MASKED:
            sees = key[None, :] <= position[:, None]
            if HAS_WINDOW:
                sees &= key[None, :] > position[:, None] - window
            score = tl.where(sees, score, float("-inf"))
        # The unit is positive, so the maximum may be taken before it is applied, and then score times unit
        # less maximum is one instruction.
        new_highest = tl.maximum(highest, tl.max(score, axis=1) * unit)
        weight = tl.exp2(score * unit - new_highest[:, None])
        fade = tl.exp2(highest - new_highest)
        total = total * fade + tl.sum(weight, axis=1)
        if EIGHT_BITS:  # no earlier: twice the size, they would stay in registers until now
            values = values.to(tl.float16)
        acc = tl.dot(weight.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        highest = new_highest
        ids = next_ids
    return acc, highest, total
