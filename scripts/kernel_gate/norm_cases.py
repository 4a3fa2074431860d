"""What the engine launches of `add_rms_norm`: hidden sizes from small models to the largest."""

from __future__ import annotations

import torch
from chiron_kernels.gpu.launch import Launch
from chiron_kernels.gpu.norm import add_rms_norm_launch

from scripts.kernel_gate.case import Case

WIDTHS = (576, 2048, 4096, 8192, 16384)


def _launch(width: int, dtype: torch.dtype, adds: bool) -> Launch:
    x = torch.empty(64, width, dtype=dtype, device="meta")
    weight = torch.empty(width, dtype=dtype, device="meta")
    return add_rms_norm_launch(x, x if adds else None, weight, 1e-5, x, x)


def cases() -> list[Case]:
    found = []
    for width in WIDTHS:
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            for adds in (False, True):
                name = f"add_rms_norm {width} {short}{' add' if adds else ''}"
                found.append(Case(name, lambda w=width, d=dtype, a=adds: _launch(w, d, a), narrow_loads=0))
    return found
