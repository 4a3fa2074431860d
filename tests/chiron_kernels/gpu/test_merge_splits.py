"""Joining the splits of a request."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from chiron_kernels.gpu.decode_plan import DecodeSplits
from chiron_kernels.gpu.merge_splits import merge_splits
from chiron_kernels.reference.merge_splits import merge_splits as reference_merge_splits

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def split_in(counts: list[int], kv_heads: int, query_len: int, device: torch.device) -> DecodeSplits:
    """Requests with so many splits each, and two columns that are not in use."""
    first = [sum(counts[:request]) for request in range(len(counts))]
    return DecodeSplits(
        work=torch.zeros(5, sum(counts) + 2, dtype=torch.int32, device=device),
        requests=torch.tensor([first, counts], dtype=torch.int32, device=device),
        tile=64,
        programs=1,
        table_keys=1024,
        kv_heads=kv_heads,
        query_len=query_len,
        window=None,
    )


def parts(
    splits: DecodeSplits, group: int, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each split; of columns not in use and of requests with one split, NaN."""
    generator = torch.Generator().manual_seed(head_dim)
    shape = (splits.capacity, splits.kv_heads, group * splits.query_len, head_dim)
    partial = torch.randn(shape, generator=generator)
    partial_lse = 20 * torch.randn(shape[:3], generator=generator)
    unused = torch.ones(splits.capacity, dtype=torch.bool)
    for first, count in splits.requests.T.tolist():
        if count > 1:
            unused[first : first + count] = False
    partial[unused] = partial_lse[unused] = torch.nan
    return partial.to(device), partial_lse.to(device)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("counts", "kv_heads", "group", "query_len", "head_dim"),
    [([1, 2, 100], 2, 3, 1, 80), ([17, 1, 16], 1, 2, 3, 128), ([33], 1, 1, 2, 256), ([4], 1, 2, 1, 2)],
)
def test_equals_the_reference(
    counts: list[int],
    kv_heads: int,
    group: int,
    query_len: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    splits = split_in(counts, kv_heads, query_len, device)
    partial, partial_lse = parts(splits, group, head_dim, device)
    shape = (len(counts) * query_len, kv_heads * group, head_dim)
    found, wanted = (
        (torch.full(shape, 7.0, dtype=like, device=device), torch.full(shape[:2], 7.0, device=device))
        for like in (dtype, torch.float64)
    )
    merge_splits(partial, partial_lse, splits, *found)
    reference_merge_splits(partial, partial_lse, splits, *wanted)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-5)
    alone = torch.tensor(counts).repeat_interleave(query_len) == 1
    assert (found[0][alone] == 7).all() and (found[1][alone] == 7).all()


def test_splits_in_which_a_row_sees_nothing(device: torch.device) -> None:
    splits = split_in([3], 1, 1, device)
    partial, partial_lse = parts(splits, 2, 16, device)
    partial[[0, 2]] = 0.0
    partial_lse[[0, 2]] = -math.inf
    out, lse = torch.full((1, 2, 16), torch.nan, device=device), torch.full((1, 2), torch.nan, device=device)
    merge_splits(partial, partial_lse, splits, out, lse)
    torch.testing.assert_close(out[0], partial[1, 0])
    torch.testing.assert_close(lse[0], partial_lse[1, 0] * math.log(2))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("partial", lambda x: x.half(), "partial is float16; it must be float32"),
        ("partial", lambda x: x[:2], r"partial is \[2, 2, 6, 16\]; it must be \[5, 2, any, any\]"),
        ("partial", lambda x: x[:, :, :5].contiguous(), "partial has 5 rows of a head"),
        ("partial", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "partial has strides"),
        ("partial_lse", lambda x: x[:, :, :3], r"partial_lse is \[5, 2, 3\]; it must be \[5, 2, 6\]"),
        ("partial_lse", lambda x: x.to("meta"), "partial_lse is on meta"),
        ("out", lambda x: x[:1], r"out is \[1, 6, 16\]; it must be \[2, 6, 16\]"),
        ("out", lambda x: x.double(), "out is float64"),
        ("lse", lambda x: x.half(), "lse is float16; it must be float32"),
        ("lse", lambda x: x[:, :2], r"lse is \[2, 2\]; it must be \[2, 6\]"),
    ],
)
def test_bad_arguments_are_named(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], says: str, device: torch.device
) -> None:
    splits = split_in([3], 2, 2, device)
    partial, partial_lse = parts(splits, 3, 16, device)
    arguments = {
        "partial": partial,
        "partial_lse": partial_lse,
        "out": torch.empty(2, 6, 16, device=device),
        "lse": torch.empty(2, 6, device=device),
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=says):
        merge_splits(splits=splits, **arguments)
