"""Attention over parts of the keys, joined."""

from __future__ import annotations

import pytest
import torch
from chiron_kernels.gpu.merge_parts import merge_parts, merge_parts_launch
from chiron_kernels.reference.merge_parts import merge_parts as reference_merge_parts

TOKENS, HEADS = 4, 3


def parts(
    splits: int, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of row 1, head 0 only the last part has a weight; results without one are NaN."""
    generator = torch.Generator().manual_seed(splits * head_dim)
    partial = torch.randn(splits, TOKENS, HEADS, head_dim, generator=generator)
    sums = 40 * torch.randn(splits, TOKENS, HEADS, generator=generator)
    sums[:-1, 1, 0] = float("-inf")
    partial[:-1, 1, 0] = float("nan")
    return partial.to(device), sums.to(device), torch.tensor([1, 2, TOKENS], device=device)


@pytest.mark.parametrize("splits", [1, 2, 5, 16])
@pytest.mark.parametrize("head_dim", [34, 64, 256])
def test_equals_the_reference(splits: int, head_dim: int, device: torch.device) -> None:
    partial, sums, starts = parts(splits, head_dim, device)
    lse = torch.full((TOKENS, HEADS), float("nan"), device=device)
    out = merge_parts(partial, sums, starts, torch.float32, lse)
    exact_lse = lse.double()
    exact = reference_merge_parts(partial.double(), sums.double(), starts, torch.float64, exact_lse)
    torch.testing.assert_close(out[1:].double(), exact[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[1:].double(), exact_lse[1:], rtol=1e-6, atol=1e-5)
    assert lse[0].isnan().all()


def test_rows_in_no_chunk_are_left_alone(device: torch.device) -> None:
    partial, sums, starts = parts(2, 64, device)
    out = torch.full((TOKENS, HEADS, 64), float("nan"), dtype=torch.bfloat16, device=device)
    merge_parts_launch(partial, sums, starts, out).run()
    assert out[0].isnan().all() and out[1:].isfinite().all()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("partial", lambda x: x[0], "partial is "),
        ("partial", lambda x: x.half(), "partial is float16; it must be float32"),
        ("partial", lambda x: x[..., ::2], "partial has strides"),
        ("sums", lambda x: x[:1], r"sums is \[1, 4, 3\]; it must be \[2, 4, 3\]"),
        ("sums", lambda x: x.double(), "sums is float64; it must be float32"),
        ("sums", lambda x: x.to("meta"), "sums is on meta"),
        ("query_starts", lambda x: x.int(), "query_starts is int32; it must be int64"),
        ("query_starts", lambda x: x[:0], "query_starts is "),
        ("dtype", lambda x: torch.float64, "out is float64"),
        ("lse", lambda x: torch.zeros(3), r"lse is \[3\]; it must be \[4, 3\]"),
    ],
)
def test_bad_arguments_are_named(name: str, change, says: str, device: torch.device) -> None:
    partial, sums, starts = parts(2, 64, device)
    arguments = {
        "partial": partial,
        "sums": sums,
        "query_starts": starts,
        "dtype": torch.float16,
        "lse": None,
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=says):
        merge_parts(**arguments)


def test_too_many_parts_are_refused(device: torch.device) -> None:
    partial, sums = torch.zeros(17, 1, 1, 64, device=device), torch.zeros(17, 1, 1, device=device)
    with pytest.raises(ValueError, match="it must have 1 to 16 parts"):
        merge_parts(partial, sums, torch.tensor([0, 1], device=device), torch.float16)
