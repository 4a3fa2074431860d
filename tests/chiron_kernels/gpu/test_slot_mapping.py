"""Where in the paged pool each token of a step goes."""

from __future__ import annotations

import pytest
import torch
from chiron_kernels.gpu.slot_mapping import TILE, slot_mapping
from chiron_kernels.reference.slot_mapping import slot_mapping as reference_slot_mapping

MAPPINGS = [slot_mapping, reference_slot_mapping]


def steps(
    rows: int, block_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions anywhere within 3 tables of 5 blocks, the ids of which exceed 32 bits."""
    generator = torch.Generator().manual_seed(rows * block_size)
    tables = torch.randperm(15, generator=generator).view(3, 5) + 2**33
    positions = torch.randint(5 * block_size, (rows,), generator=generator)
    row_of = torch.randint(3, (rows,), generator=generator)
    return positions.to(device), row_of.to(device), tables.to(device)


@pytest.mark.parametrize("rows", [1, 5, TILE - 1, TILE, TILE + 1])
@pytest.mark.parametrize("block_size", [1, 4, 16, 48, 64])
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_each_token_goes_to_its_place(rows: int, block_size: int, mapping, device: torch.device) -> None:
    positions, row_of, tables = steps(rows, block_size, device)
    blocks, offsets = mapping(positions, row_of, tables, block_size)
    for position, row, block, offset in zip(
        positions.tolist(), row_of.tolist(), blocks.tolist(), offsets.tolist(), strict=True
    ):
        assert (block, offset) == (int(tables[row, position // block_size]), position % block_size)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_padding_and_what_no_table_has(mapping, device: torch.device) -> None:
    _, _, tables = steps(1, 4, device)
    positions = torch.tensor([-1, 3, -7, 19, 20, 2**40, 3, 3], device=device)
    row_of = torch.tensor([0, 2, 2, 1, 1, 1, 3, -1], device=device)
    blocks, offsets = mapping(positions, row_of, tables, 4)
    assert blocks.tolist() == [-1, int(tables[2, 0]), -1, int(tables[1, 4]), -1, -1, -1, -1]
    assert offsets.tolist() == [0, 3, 0, 3, 0, 0, 0, 0]


def test_tables_that_are_part_of_wider_ones(device: torch.device) -> None:
    positions, row_of, tables = steps(5, 4, device)
    wide = torch.full((3, 9), -5, device=device)
    wide[:, :5] = tables
    for found, expected in zip(
        slot_mapping(positions, row_of, wide[:, :5], 4),
        slot_mapping(positions, row_of, tables, 4),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_no_rows(device: torch.device) -> None:
    positions, row_of, tables = steps(0, 4, device)
    blocks, offsets = slot_mapping(positions, row_of, tables, 4)
    assert blocks.shape == offsets.shape == (0,)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("positions", lambda x: x[None], r"positions is \[1, 5\]; it must be \[any\]"),
        ("positions", lambda x: x.int(), "positions is int32; it must be int64"),
        ("positions", lambda x: x.repeat(2)[::2], "positions has stride 2"),
        ("row_of", lambda x: x[:4], r"row_of is \[4\]; it must be \[5\]"),
        ("row_of", lambda x: x.int(), "row_of is int32; it must be int64"),
        ("row_of", lambda x: x.to("meta"), "row_of is on meta"),
        ("tables", lambda x: x[0], r"tables is \[5\]; it must be \[any, any\]"),
        ("tables", lambda x: x.int(), "tables is int32; it must be int64"),
        ("tables", lambda x: x.T.contiguous().T, "tables has stride 3 in its last dimension"),
        ("tables", lambda x: x.to("meta"), "tables is on meta"),
        ("block_size", lambda x: 0, "block_size is 0; it must be 1 or more"),
    ],
)
def test_bad_arguments_are_named(name: str, change, says: str, device: torch.device) -> None:
    positions, row_of, tables = steps(5, 4, device)
    given = {"positions": positions, "row_of": row_of, "tables": tables, "block_size": 4}
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=says):
        slot_mapping(**given)
