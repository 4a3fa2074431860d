"""What the engine launches of `kv_write`: heads of small to large models."""

from __future__ import annotations

import torch
from chiron_kernels.gpu.kv_write import kv_write_launch
from chiron_kernels.gpu.launch import HOPPER, Launch
from chiron_kernels.gpu.paged_kv import EIGHT_BITS

from scripts.kernel_gate.case import ARCHITECTURES, Case

ROWS = 64
HEADS = ((3, 64), (8, 128), (1, 128), (4, 256), (32, 96))


def _launch(kv_heads: int, dim: int, dtype: torch.dtype, stored: torch.dtype) -> Launch:
    k = torch.empty(ROWS, kv_heads, dim, dtype=dtype, device="meta")
    kv = torch.empty(8, 16, 2, kv_heads, dim, dtype=stored, device="meta")
    places = torch.empty(ROWS, dtype=torch.int64, device="meta")
    return kv_write_launch(k, k, kv, places, places)


def cases() -> list[Case]:
    """narrow_loads: where a token goes, its block and its offset. Pools of 8 bits: of the
    architectures compiled for, those that have such floats."""
    kinds = (
        (torch.bfloat16, torch.bfloat16, "bf16"),
        (torch.float32, torch.float32, "fp32"),
        (torch.bfloat16, EIGHT_BITS, "bf16 fp8 kv"),
        (torch.float32, EIGHT_BITS, "fp32 fp8 kv"),
    )
    return [
        Case(
            f"kv_write {kv_heads}kv {dim} {short}",
            lambda h=kv_heads, n=dim, d=dtype, s=stored: _launch(h, n, d, s),
            tuple(a for a in ARCHITECTURES if a >= HOPPER or stored != EIGHT_BITS),
            narrow_loads=2,
        )
        for kv_heads, dim in HEADS
        for dtype, stored, short in kinds
    ]
