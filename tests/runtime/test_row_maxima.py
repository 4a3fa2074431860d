"""The largest values of rows, looked through in blocks, against torch's own search."""

from __future__ import annotations

import pytest
import torch

from chiron_engine.runtime.row_maxima import largest, largest_few

WIDTHS = [1, 7, 64, 300, 1024, 1056, 4096]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_first_of_the_largest_is_found(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    few_values = torch.randint(0, 5, (20, width), generator=generator).float()
    few_values[3] = -torch.inf
    for rows in (torch.randn(20, width, generator=generator), few_values, few_values[:, ::2]):
        if rows.shape[1]:
            values, places = largest(rows)
            assert torch.equal(values, rows.amax(dim=-1))
            assert torch.equal(places, (rows == values.unsqueeze(1)).to(torch.uint8).argmax(dim=-1))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_the_largest_few_are_found(width: int, count: int) -> None:
    generator = torch.Generator().manual_seed(width + count)
    few_values = torch.randint(0, 5, (20, width), generator=generator).float()
    few_values[3, 1:] = -torch.inf
    for rows in (torch.randn(20, width, generator=generator), few_values):
        count = min(count, width)
        values, places = largest_few(rows, count)
        assert torch.equal(values, rows.topk(count, dim=-1).values)
        assert torch.equal(rows.gather(1, places), values)
        assert all(len(set(row)) == count for row in places.tolist())


def test_a_row_that_is_broken_stays_so() -> None:
    rows = torch.zeros(2, 1024)
    rows[1, 700] = torch.nan
    assert torch.isnan(largest(rows)[0]).tolist() == [False, True]
