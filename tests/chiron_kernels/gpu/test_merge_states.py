"""Joining attention over two sets of keys."""

from __future__ import annotations

import math

import pytest
import torch
from chiron_kernels.gpu.merge_states import merge_states, merge_states_launch
from chiron_kernels.reference.merge_states import merge_states as reference_merge_states

from tests.chiron_kernels.gpu.decode_batch import assert_close, make_batch

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def parts(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens * head_dim)
    values = torch.randn(2, tokens, heads, head_dim, generator=generator).to(device, dtype)
    logs = (20 * torch.randn(2, tokens, heads, generator=generator)).to(device)
    return {"first": values[0], "first_lse": logs[0], "second": values[1], "second_lse": logs[1]}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(3, 5, 64), (2, 9, 80), (1, 1, 256), (0, 4, 64)])
def test_equals_the_reference(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    given = parts(tokens, heads, head_dim, dtype, device)
    out, lse = merge_states(**given)
    wide = {name: tensor.double() for name, tensor in given.items()}
    exact, exact_lse = reference_merge_states(**wide)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


def test_parts_without_keys(device: torch.device) -> None:
    given = parts(1, 4, 16, torch.float16, device)
    given["first_lse"][0, :2] = given["second_lse"][0, 1:3] = -math.inf
    out, lse = merge_states(**given)
    assert torch.equal(out[0, 0], given["second"][0, 0]) and torch.equal(out[0, 2], given["first"][0, 2])
    assert not out[0, 1].any() and lse[0, 1] == -math.inf
    torch.testing.assert_close(lse, reference_merge_states(**given)[1])


def test_in_place(device: torch.device) -> None:
    given = parts(2, 3, 64, torch.float16, device)
    expected = merge_states(**given)
    merge_states_launch(**given, out=given["second"], lse=given["second_lse"]).run()
    assert torch.equal(given["second"], expected[0]) and torch.equal(given["second_lse"], expected[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("places", [[4, 0, 2], [1], []])
def test_rows_that_have_no_first_part(places: list[int], dtype: torch.dtype, device: torch.device) -> None:
    given = parts(6, 5, 80, dtype, device)
    given["first"], given["first_lse"] = given["first"][: len(places)], given["first_lse"][: len(places)]
    where = torch.tensor(places, dtype=torch.int64, device=device)
    out, lse = merge_states(**given, places=where)
    exact, exact_lse = reference_merge_states(**{name: t.double() for name, t in given.items()}, places=where)
    torch.testing.assert_close(out.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    others = [row for row in range(6) if row not in places]
    assert torch.equal(out[others], given["second"][others])
    launch = merge_states_launch(**given, out=given["second"], lse=given["second_lse"], places=where)
    launch.run()
    assert torch.equal(given["second"], out) and torch.equal(given["second_lse"], lse)


@pytest.mark.parametrize(
    ("places", "says"),
    [
        (torch.zeros(3, dtype=torch.int64), r"places is \[3\]; it must be \[2\]"),
        (torch.zeros(2, dtype=torch.int32), "places is int32; it must be int64"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "places is on meta"),
    ],
)
def test_bad_places_are_named(places: torch.Tensor, says: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=says):
        merge_states(**parts(2, 3, 16, torch.float16, device), places=places)


def test_sums_that_are_no_numbers_show(device: torch.device) -> None:
    given = parts(2, 3, 16, torch.float16, device)
    given["second_lse"][1, 2] = torch.nan
    out, lse = merge_states(**given)
    assert lse.isnan().nonzero().tolist() == [[1, 2]] and out[1, 2].isnan().all()
    assert out.isnan().sum() == 16


def test_prefix_and_rest_are_the_whole(device: torch.device) -> None:
    """Attention over a request's first block, and over the others, as decode attention has them."""
    whole = make_batch([64 + 70], device)
    expected = whole.exact()
    states = []
    for start, length in ((0, 64), (1, 70)):
        part = make_batch([64 + 70], device)
        part.tables = part.tables[:, start:].contiguous()
        part.lens.fill_(length)
        states += part.attend()
    assert_close(merge_states(*states), expected, torch.float16)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("first", lambda x: x[0], r"first is \[3, 16\]; it must be \[any, any, any\]"),
        ("first", lambda x: x.double(), "first is float64"),
        ("second", lambda x: x.float(), "second is float32; it must be float16"),
        ("second", lambda x: x[:1], r"second is \[1, 3, 16\]; it must be \[2, 3, 16\]"),
        ("second", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "second has strides"),
        ("first_lse", lambda x: x.half(), "first_lse is float16; it must be float32"),
        ("second_lse", lambda x: x[:, :2], r"second_lse is \[2, 2\]; it must be \[2, 3\]"),
        ("second_lse", lambda x: x.to("meta"), "second_lse is on meta"),
    ],
)
def test_bad_arguments_are_named(name: str, change, says: str, device: torch.device) -> None:
    given = parts(2, 3, 16, torch.float16, device)
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=says):
        merge_states(**given)
