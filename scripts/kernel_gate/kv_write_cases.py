"""What the engine launches of `kv_write`: heads of small to large models."""

from __future__ import annotations

import torch
from chiron_kernels.gpu.kv_write import kv_write_launch
from chiron_kernels.gpu.launch import Launch

from scripts.kernel_gate.case import Case

ROWS = 64
HEADS = ((3, 64), (8, 128), (1, 128), (4, 256), (32, 96))


def _launch(kv_heads: int, dim: int, dtype: torch.dtype) -> Launch:
    k = torch.empty(ROWS, kv_heads, dim, dtype=dtype, device="meta")
    kv = torch.empty(8, 16, 2, kv_heads, dim, dtype=dtype, device="meta")
    places = torch.empty(ROWS, dtype=torch.int64, device="meta")
    return kv_write_launch(k, k, kv, places, places)


def cases() -> list[Case]:
    """narrow_loads: where a token goes, its block and its offset."""
    return [
        Case(
            f"kv_write {kv_heads}kv {dim} {short}",
            lambda h=kv_heads, n=dim, d=dtype: _launch(h, n, d),
            narrow_loads=2,
        )
        for kv_heads, dim in HEADS
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
    ]
