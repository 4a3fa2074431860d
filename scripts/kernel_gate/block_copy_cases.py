"""What the engine launches to copy blocks: of a small model, of a large one, and through a dense buffer."""

from __future__ import annotations

import torch
from chiron_kernels.gpu.block_copy import copy_blocks_launch
from chiron_kernels.gpu.launch import Launch

from scripts.kernel_gate.case import Case

COUNT = 16
BLOCK_BYTES = {"small": 45 << 10, "large": 2 << 20}


def _launch(size: int, gathers: bool, scatters: bool) -> Launch:
    blocks = torch.empty(64, size, dtype=torch.uint8, device="meta")
    rows = torch.empty(COUNT, dtype=torch.int64, device="meta")
    return copy_blocks_launch(blocks, rows if gathers else None, blocks, rows if scatters else None)


def cases() -> list[Case]:
    """narrow_loads: the row of a block on either side."""
    kinds = {"copy_blocks": (True, True), "gather_blocks": (True, False), "scatter_blocks": (False, True)}
    return [
        Case(
            f"{kind} {name}",
            lambda b=size, g=gathers, s=scatters: _launch(b, g, s),
            narrow_loads=gathers + scatters,
        )
        for kind, (gathers, scatters) in kinds.items()
        for name, size in BLOCK_BYTES.items()
    ]
