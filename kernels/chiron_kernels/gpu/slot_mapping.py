"""Where in the paged pool each token of a step goes, worked out on the device: no value is read back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.checks import check_device, check_dtype, check_last_dense, check_shape
from chiron_kernels.gpu.launch import Launch

TILE = 128
"""Rows of a program, one a thread: each waits for three loads, two of them one after the other."""
NO_BLOCK = -1


# None of the sizes makes the code better for being known, and they change with every step.
@triton.jit(do_not_specialize=["rows", "num_tables", "num_columns", "table_stride"])
def _slot_mapping(
    positions,  # int64 [T]
    row_of,  # int64 [T]
    tables,  # int64 [S, W]
    blocks,  # int64 [T] out
    offsets,  # int64 [T] out
    rows,  # T
    num_tables,  # S
    num_columns,  # W
    table_stride,
    NO_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    position = tl.load(positions + row, mask=inside, other=-1)
    table = tl.load(row_of + row, mask=inside, other=0)
    column = position // BLOCK_SIZE
    known = (position >= 0) & (column < num_columns) & (table >= 0) & (table < num_tables)
    block = tl.load(tables + table * table_stride + column, mask=known, other=NO_BLOCK)
    tl.store(blocks + row, block, mask=inside)
    tl.store(offsets + row, tl.where(known, position % BLOCK_SIZE, 0), mask=inside)


def slot_mapping_launch(
    positions: torch.Tensor,
    row_of: torch.Tensor,
    tables: torch.Tensor,
    block_size: int,
    write_blocks: torch.Tensor,
    write_offsets: torch.Tensor,
) -> Launch:
    """write_blocks, write_offsets: int64 [T], written. Otherwise as `slot_mapping`."""
    check_shape("positions", positions, (None,))
    rows = positions.shape[0]
    check_shape("tables", tables, (None, None))
    named = {
        "positions": positions,
        "row_of": row_of,
        "write_blocks": write_blocks,
        "write_offsets": write_offsets,
    }
    for name, tensor in named.items():
        check_shape(name, tensor, (rows,))
    for name, tensor in {**named, "tables": tables}.items():
        check_dtype(name, tensor, (torch.int64,))
        check_last_dense(name, tensor)
    check_device(positions, row_of=row_of, tables=tables, write_blocks=write_blocks)
    check_device(positions, write_offsets=write_offsets)
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be 1 or more")
    return Launch(
        _slot_mapping,
        (-(-rows // TILE),),
        {
            "positions": positions,
            "row_of": row_of,
            "tables": tables,
            "blocks": write_blocks,
            "offsets": write_offsets,
            "rows": rows,
            "num_tables": tables.shape[0],
            "num_columns": tables.shape[1],
            "table_stride": tables.stride(0),
            "NO_BLOCK": NO_BLOCK,
            "BLOCK_SIZE": block_size,
            "TILE": TILE,
        },
        num_warps=TILE // 32,
        num_stages=1,
    )


def slot_mapping(
    positions: torch.Tensor, row_of: torch.Tensor, tables: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """write_blocks, write_offsets, int64 [T]: tables[row_of[t], positions[t] // block_size], and
    positions[t] % block_size.

    positions, row_of: int64 [T]. tables: int64 [S, W], block ids. A row of a negative position is padding:
    its block is -1 and its offset 0. So it is too for a row whose table or block would be outside `tables`.
    What writes to the pool leaves out such rows. Raises ValueError for what does not fit."""
    blocks, offsets = torch.empty_like(positions), torch.empty_like(positions)
    slot_mapping_launch(positions, row_of, tables, block_size, blocks, offsets).run()
    return blocks, offsets
