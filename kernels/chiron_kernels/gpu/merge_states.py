"""Joining attention over two sets of keys into attention over both, as for a prefix that requests share.

Of each part there are the values o_i, normalised by the sum s_i of its softmax, and log(s_i). Of both

    s = s_1 + s_2        o = (s_1 o_1 + s_2 o_2) / s

taken relative to the larger sum, so that none overflows (Ye et al. 2025, arXiv:2501.01005, who call it the
composition of attention states). Where only some rows have a first part, `places` says which.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.base_two import LOG2_E, LOWEST
from chiron_kernels.gpu.checks import (
    FLOATS,
    check_contiguous,
    check_device,
    check_dtype,
    check_shape,
    check_vectors,
)
from chiron_kernels.gpu.launch import Launch, power_of_two_from

TILE_ELEMENTS = 2048
"""Values of a program: for each thread 2 loads of 16 bytes from either part."""


# Not specialised: a number that varies while serving and that no alignment follows from.
@triton.jit(do_not_specialize=["rows"])
def _merge_states(
    first,  # [N, D] contiguous
    first_lse,  # float32 [N]
    second,  # [M, D] contiguous
    second_lse,  # float32 [M]
    places,  # int64 [N / HEADS], read if PLACED
    out,  # [M, D] out
    lse,  # float32 [M] out
    rows,  # N
    HEADS: tl.constexpr,
    PLACED: tl.constexpr,  # else M is N
    D: tl.constexpr,
    COLUMNS: tl.constexpr,  # the power of two from D up
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target = row
    if PLACED:
        target = tl.load(places + row // HEADS, inside, 0) * HEADS + row % HEADS
    first_log = tl.load(first_lse + row, inside, 0.0)
    second_log = tl.load(second_lse + target, inside, 0.0)
    # A number even where neither part has keys: -inf less -inf is none.
    higher = tl.maximum(tl.maximum(first_log, second_log), LOWEST)
    first_weight = tl.exp2((first_log - higher) * LOG2_E)
    second_weight = tl.exp2((second_log - higher) * LOG2_E)
    total = first_weight + second_weight
    # Neither part may have keys. A sum that is no number is not 0: it shows.
    some = tl.where(total != 0.0, total, 1.0)

    column = tl.arange(0, COLUMNS)
    source_index = row[:, None] * D + column[None, :]
    index = target[:, None] * D + column[None, :]
    valid = inside[:, None] & (column < D)[None, :]
    first_values = tl.load(first + source_index, valid, 0.0).to(tl.float32)
    second_values = tl.load(second + index, valid, 0.0).to(tl.float32)
    values = first_values * (first_weight / some)[:, None] + second_values * (second_weight / some)[:, None]
    # The result may lie over the second part, whose sums are read by more threads than write them.
    tl.debug_barrier()
    tl.store(out + index, values.to(out.dtype.element_ty), valid)
    tl.store(lse + target, tl.where(total != 0.0, higher + tl.log(some), float("-inf")), inside)


def merge_states_launch(
    first: torch.Tensor,
    first_lse: torch.Tensor,
    second: torch.Tensor,
    second_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    places: torch.Tensor | None = None,
) -> Launch:
    """out: like second, lse: like second_lse, written, with `places` in these rows alone; each may be that of
    the second part, without `places` that of either. Otherwise as `merge_states`."""
    check_shape("first", first, (None, None, None))
    check_dtype("first", first, FLOATS)
    tokens, heads, head_dim = first.shape
    if places is not None:
        check_shape("second", second, (None, heads, head_dim))
        check_vectors(first, tokens, places=(places, torch.int64))
    whole = tokens if places is None else second.shape[0]
    for name, values, count in (("first", first, tokens), ("second", second, whole), ("out", out, whole)):
        check_shape(name, values, (count, heads, head_dim))
        check_dtype(name, values, (first.dtype,))
        check_contiguous(name, values)
    of_logs = (("first_lse", first_lse, tokens), ("second_lse", second_lse, whole), ("lse", lse, whole))
    for name, logs, count in of_logs:
        check_shape(name, logs, (count, heads))
        check_dtype(name, logs, (torch.float32,))
        check_contiguous(name, logs)
    check_device(first, second=second, out=out, first_lse=first_lse, second_lse=second_lse, lse=lse)
    if not 0 < head_dim <= TILE_ELEMENTS:
        raise ValueError(f"first has heads of {head_dim}; they must be of 1 to {TILE_ELEMENTS}")
    columns = power_of_two_from(head_dim)
    tile_rows = TILE_ELEMENTS // columns
    rows = tokens * heads
    return Launch(
        _merge_states,
        (-(-rows // tile_rows),),
        {
            "first": first,
            "first_lse": first_lse,
            "second": second,
            "second_lse": second_lse,
            "places": first_lse if places is None else places,
            "out": out,
            "lse": lse,
            "rows": rows,
            "HEADS": 1 if places is None else heads,
            "PLACED": places is not None,
            "D": head_dim,
            "COLUMNS": columns,
            "ROWS": tile_rows,
        },
        num_stages=1,
    )


def merge_states(
    first: torch.Tensor,
    first_lse: torch.Tensor,
    second: torch.Tensor,
    second_lse: torch.Tensor,
    places: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of both parts, and the logarithm of its softmax's sum.

    first, second: [T, H, D] contiguous, of one dtype: attention over disjoint keys. first_lse, second_lse:
    float32 [T, H], natural logarithms, -inf for no keys, where the values must be numbers. places: int64 [T],
    where the second part has other rows: to which of them each row of the first part belongs, no two to the
    same. They must be in range, which only the device could check; the results have the second part's rows,
    and where there is no first part its values. Raises ValueError for what does not fit."""
    out, lse = (torch.empty_like(part) if places is None else part.clone() for part in (second, second_lse))
    merge_states_launch(first, first_lse, second, second_lse, out, lse, places).run()
    return out, lse
