"""Where in the paged pool each token of a step goes."""

from __future__ import annotations

import torch


def slot_mapping(
    positions: torch.Tensor, row_of: torch.Tensor, tables: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """write_blocks, write_offsets, int64 [T]: tables[row_of[t], positions[t] // block_size], and
    positions[t] % block_size; -1 and 0 for a negative position, or one outside `tables`."""
    column = positions.div(block_size, rounding_mode="floor")
    known = (positions >= 0) & (column < tables.shape[1]) & (row_of >= 0) & (row_of < tables.shape[0])
    blocks, offsets = torch.full_like(positions, -1), torch.zeros_like(positions)
    blocks[known] = tables[row_of[known], column[known]]
    offsets[known] = positions[known] % block_size
    return blocks, offsets
