"""What the engine launches of `slot_mapping`: the block sizes of the pool."""

from __future__ import annotations

import torch
from chiron_kernels.gpu.launch import Launch
from chiron_kernels.gpu.slot_mapping import slot_mapping_launch

from scripts.kernel_gate.case import Case

BLOCK_SIZES = (16, 64)


def _launch(block_size: int) -> Launch:
    row = torch.empty(64, dtype=torch.int64, device="meta")
    tables = torch.empty(8, 128, dtype=torch.int64, device="meta")
    return slot_mapping_launch(row, row, tables, block_size, row, row)


def cases() -> list[Case]:
    """narrow_loads: of one int64 a thread: a position, the row of a table and a block."""
    return [Case(f"slot_mapping {size}", lambda b=size: _launch(b), narrow_loads=3) for size in BLOCK_SIZES]
