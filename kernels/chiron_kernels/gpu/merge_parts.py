"""Attention over parts of the keys, joined into attention over all of them.

With s_p = log2 of part p's sum of weights, part p holds the 2^(s_p - s) share of the whole sum, s = log2 of
the sum of all 2^(s_p). Parts are added in their order, so equal parts make equal results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.base_two import LN_2
from chiron_kernels.gpu.checks import FLOATS, check_contiguous, check_device, check_dtype, check_shape
from chiron_kernels.gpu.launch import Launch, power_of_two_from

MOST_SPLITS = 16
"""One program has room for so many parts of a row, there or not: the rest is not read, and one kernel serves
every number."""


@triton.jit(do_not_specialize=["splits", "tokens", "chunks"], do_not_specialize_on_alignment=["query_starts"])
def _merge_parts(
    partial,  # float32 [P, T, H, HEAD_DIM]
    sums,  # float32 [P, T, H], log2 of the sums of weights
    query_starts,  # int64 [C + 1]
    out,  # [T, H, HEAD_DIM]
    lse,  # float32 [T, H], not written unless HAS_LSE
    splits,  # P
    tokens,  # T
    chunks,  # C
    HAS_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # the power of two from HEAD_DIM up
    SPLITS: tl.constexpr,  # the most there may be
):
    """Program (t, h) joins the parts of one row."""
    token = tl.program_id(0)
    if (token < tl.load(query_starts)) | (token >= tl.load(query_starts + chunks)):
        return
    heads = tl.num_programs(1)
    row = token.to(tl.int64) * heads + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM)
    at = split.to(tl.int64) * tokens * heads + row
    part_sum = tl.load(sums + at, mask=split < splits, other=float("-inf"))
    highest = tl.max(part_sum, axis=0)
    weight = tl.exp2(part_sum - highest)
    # The values of a part without weight were never written.
    written = (part_sum > float("-inf"))[:, None] & (dim < HEAD_DIM)[None, :]
    values = tl.load(partial + (at * HEAD_DIM)[:, None] + dim[None, :], mask=written, other=0.0)
    total = tl.sum(weight, axis=0)
    result = tl.sum(values * weight[:, None], axis=0) / total
    tl.store(out + row * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
    if HAS_LSE:
        tl.store(lse + row, (highest + tl.log2(total)) * LN_2)


def merge_parts_launch(
    partial: torch.Tensor,
    sums: torch.Tensor,
    query_starts: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> Launch:
    """out: [T, H, D] contiguous, written. Otherwise as `merge_parts`."""
    check_shape("partial", partial, (None, None, None, None))
    splits, tokens, heads, head_dim = partial.shape
    check_shape("sums", sums, (splits, tokens, heads))
    check_shape("query_starts", query_starts, (None,))
    check_dtype("query_starts", query_starts, (torch.int64,))
    check_shape("out", out, (tokens, heads, head_dim))
    check_dtype("out", out, FLOATS)
    if lse is not None:
        check_shape("lse", lse, (tokens, heads))
    for name, tensor in (("partial", partial), ("sums", sums), ("lse", lse)):
        if tensor is not None:
            check_dtype(name, tensor, (torch.float32,))
    tensors = {"partial": partial, "sums": sums, "query_starts": query_starts, "out": out, "lse": lse}
    for name, tensor in tensors.items():
        if tensor is not None:
            check_contiguous(name, tensor)
    check_device(partial, **tensors)
    if not 1 <= splits <= MOST_SPLITS:
        raise ValueError(f"partial is {list(partial.shape)}; it must have 1 to {MOST_SPLITS} parts")
    if query_starts.shape[0] < 1:
        raise ValueError("query_starts is [0]; it must hold 0 at least")
    dim = power_of_two_from(head_dim)
    return Launch(
        _merge_parts,
        (tokens, heads),
        {
            **tensors,
            "lse": sums if lse is None else lse,
            "splits": splits,
            "tokens": tokens,
            "chunks": query_starts.shape[0] - 1,
            "HAS_LSE": lse is not None,
            "HEAD_DIM": head_dim,
            "DIM": dim,
            "SPLITS": MOST_SPLITS,
        },
        # A warp reads 128 floats of a part at once.
        num_warps=1 if dim <= 64 else 2,
        num_stages=1,
    )


def merge_parts(
    partial: torch.Tensor,
    sums: torch.Tensor,
    query_starts: torch.Tensor,
    dtype: torch.dtype,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H, D] of dtype: the parts' results, weighted with their sums.

    partial: float32 [P, T, H, D], results over each of the P parts of the keys. sums: float32 [P, T, H], log2
    of their sums of weights: -inf where a part has no keys, and then its result may be anything; of each row
    one part at least has some. NaN makes NaN of its row. query_starts: int64 [C + 1]; rows query_starts[0] ..
    query_starts[C] - 1 are joined, others not written. lse: float32 [T, H], written: the natural logarithm of
    the whole sum. Raises ValueError for what does not fit."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    merge_parts_launch(partial, sums, query_starts, out, lse).run()
    return out
