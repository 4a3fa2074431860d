"""Joining what the splits of a request found: the second half of decode attention.

Each split has its values o_i, normalised by the sum s_i of its softmax, and log2(s_i). Of the whole

    s = sum of s_i        o = sum of s_i o_i / s

where all s_i are taken relative to the highest, so that none overflows. Requests with one split were
written by that, and are left alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.base_two import LN_2, LOWEST
from chiron_kernels.gpu.checks import FLOATS, check_contiguous, check_device, check_dtype, check_shape
from chiron_kernels.gpu.decode_plan import DecodeSplits
from chiron_kernels.gpu.launch import Launch, power_of_two_from

STEP_BYTES = 8192
"""Of partial values that one step of the loop reads: 16 registers of each thread."""

STAGES = 4
"""Of the pipeline, of which all but one are under way. Nothing but the latency of these reads takes time."""


@triton.jit(do_not_specialize=["batch"])
def _merge_splits(
    partial,  # float32 [capacity, KV_HEADS, QUERY_LEN * GROUP, D]
    partial_lse,  # float32 [capacity, KV_HEADS, QUERY_LEN * GROUP], to the base 2
    requests,  # int32 [2, B], see DecodeSplits
    out,  # [B * QUERY_LEN, KV_HEADS * GROUP, D] out
    lse,  # float32 [B * QUERY_LEN, KV_HEADS * GROUP] out, if LSE
    batch,  # B
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,  # the power of two from D up
    STEP: tl.constexpr,  # splits of one step
    STAGES: tl.constexpr,
    LSE: tl.constexpr,
):
    """One program for each query head of each new token."""
    query_row = tl.program_id(0).to(tl.int64)
    query_head = tl.program_id(1)
    request = query_row // QUERY_LEN
    first = tl.load(requests + request).to(tl.int64)
    splits = tl.load(requests + batch + request)
    if splits == 1:
        return

    row = query_row % QUERY_LEN * GROUP + query_head % GROUP
    source = (first * KV_HEADS + query_head // GROUP) * (QUERY_LEN * GROUP) + row
    column = tl.arange(0, COLUMNS)
    highest = LOWEST
    total = 0.0
    values = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(0, splits, STEP, num_stages=STAGES):
        split = start + tl.arange(0, STEP)
        index = source + split.to(tl.int64) * (KV_HEADS * QUERY_LEN * GROUP)
        there = split < splits
        log_sum = tl.load(partial_lse + index, there, float("-inf"))
        part = tl.load(
            partial + index[:, None] * D + column[None, :], there[:, None] & (column < D)[None, :], 0.0
        )
        higher = tl.maximum(highest, tl.max(log_sum, axis=0))
        weight = tl.exp2(log_sum - higher)
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weight, axis=0)
        values = values * fade + tl.sum(part * weight[:, None], axis=0)
        highest = higher

    # total is above 0: a request with several splits has more keys than queries, so that each sees some.
    target = query_row * (KV_HEADS * GROUP) + query_head
    tl.store(out + target * D + column, (values / total).to(out.dtype.element_ty), column < D)
    if LSE:
        tl.store(lse + target, (highest + tl.log2(total)) * LN_2)


def merge_splits_launch(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    splits: DecodeSplits,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> Launch:
    """out: [B * query_len, Hq, D] and lse: float32 [B * query_len, Hq] or None, written where a request has
    several splits. Otherwise as `merge_splits`."""
    check_shape("partial", partial, (splits.capacity, splits.kv_heads, None, None))
    _, kv_heads, rows, head_dim = partial.shape
    if rows < 1 or rows % splits.query_len:
        raise ValueError(f"partial has {rows} rows of a head; they must be a multiple of {splits.query_len}")
    group = rows // splits.query_len
    batch = splits.requests.shape[1]
    check_shape("partial_lse", partial_lse, (splits.capacity, kv_heads, rows))
    check_shape("out", out, (batch * splits.query_len, kv_heads * group, head_dim))
    check_dtype("out", out, FLOATS)
    if lse is not None:
        check_shape("lse", lse, tuple(out.shape[:2]))
    for name, wide in (("partial", partial), ("partial_lse", partial_lse), ("lse", lse)):
        if wide is not None:
            check_dtype(name, wide, (torch.float32,))
            check_contiguous(name, wide)
    check_contiguous("out", out)
    check_device(out, partial=partial, partial_lse=partial_lse, splits=splits.requests, lse=lse)
    columns = power_of_two_from(head_dim)
    return Launch(
        _merge_splits,
        tuple(out.shape[:2]),
        {
            "partial": partial,
            "partial_lse": partial_lse,
            "requests": splits.requests,
            "out": out,
            "lse": partial_lse if lse is None else lse,
            "batch": batch,
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "QUERY_LEN": splits.query_len,
            "D": head_dim,
            "COLUMNS": columns,
            "STEP": STEP_BYTES // (4 * columns),
            "STAGES": STAGES,
            "LSE": lse is not None,
        },
    )


def merge_splits(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    splits: DecodeSplits,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """The attention of requests with several splits, from that of each split.

    partial: float32 [capacity, Hkv, query_len * G, D], the attention over the keys of each split alone; row
    j * G + g is of query head g of the group and new token j. partial_lse: float32 [capacity, Hkv,
    query_len * G], log2 of the sum of exponentials. out: [B * query_len, Hq, D] and lse: float32
    [B * query_len, Hq], the natural logarithm, written for these requests and left alone for the others. Of
    each row one split at least must have keys: of -inf alone comes NaN. Raises ValueError for what does not
    fit.
    """
    merge_splits_launch(partial, partial_lse, splits, out, lse).run()
