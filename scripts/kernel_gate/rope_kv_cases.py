"""What the engine launches of `rope_kv_write`: heads of small to large models, of a part of one too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from chiron_kernels.gpu.launch import HOPPER, Launch
from chiron_kernels.gpu.paged_kv import EIGHT_BITS
from chiron_kernels.gpu.rope_kv import rope_kv_write_launch

from scripts.kernel_gate.case import ARCHITECTURES, Case

ROWS = 64


@dataclass(frozen=True, slots=True)
class Heads:
    queries: int
    kv: int
    dim: int
    rotary: int
    norm: bool = False


SHAPES = {
    "9q 3kv 64": Heads(9, 3, 64, 64),
    "32q 8kv 128": Heads(32, 8, 128, 128),
    "8q 1kv 128": Heads(8, 1, 128, 128),
    "16q 8kv 128 norm": Heads(16, 8, 128, 128, norm=True),
    "16q 4kv 256": Heads(16, 4, 256, 256),
    "32q 32kv 96": Heads(32, 32, 96, 96),
    "32q 2kv 128 half turned": Heads(32, 2, 128, 64),
    "16q 2kv 256 quarter turned, norm": Heads(16, 2, 256, 64, norm=True),
}


def _launch(heads: Heads, dtype: torch.dtype, stored: torch.dtype) -> Launch:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    weight = empty(heads.dim) if heads.norm else None
    angles = empty(ROWS, 1, heads.rotary)
    places = empty(ROWS, dtype=torch.int64)
    return rope_kv_write_launch(
        empty(ROWS, (heads.queries + 2 * heads.kv) * heads.dim),
        angles,
        angles,
        empty(8, 16, 2, heads.kv, heads.dim, dtype=stored),
        places,
        places,
        heads.queries,
        heads.kv,
        empty(ROWS, heads.queries, heads.dim),
        weight,
        weight,
        1e-6,
    )


def cases() -> list[Case]:
    """narrow_loads: where a token goes, its block and its offset, for keys and again for values. Pools of
    8 bits: of the architectures compiled for, those that have such floats."""
    kinds = (
        (torch.bfloat16, torch.bfloat16, "bf16"),
        (torch.float16, torch.float16, "fp16"),
        (torch.bfloat16, EIGHT_BITS, "bf16 fp8 kv"),
    )
    return [
        Case(
            f"rope_kv_write {name} {short}",
            lambda h=heads, d=dtype, s=stored: _launch(h, d, s),
            tuple(a for a in ARCHITECTURES if a >= HOPPER or stored != EIGHT_BITS),
            narrow_loads=4,
        )
        for name, heads in SHAPES.items()
        for dtype, stored, short in kinds
    ]
