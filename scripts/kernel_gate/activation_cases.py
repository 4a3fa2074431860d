"""What the engine launches of `gated_activation`: intermediate sizes from small models to the largest."""

from __future__ import annotations

import torch
from chiron_kernels.gpu.activation import KINDS, Activation, gated_activation_launch
from chiron_kernels.gpu.launch import Launch

from scripts.kernel_gate.case import Case

ROWS = 64
WIDTHS = (1536, 4864, 14336)


def _launch(width: int, dtype: torch.dtype, kind: Activation) -> Launch:
    gate_up = torch.empty(ROWS, 2 * width, dtype=dtype, device="meta")
    return gated_activation_launch(gate_up, kind, gate_up.new_empty(ROWS, width))


def cases() -> list[Case]:
    return [
        Case(
            f"gated_activation {width} {kind} {short}",
            lambda w=width, d=dtype, k=kind: _launch(w, d, k),
            narrow_loads=0,
        )
        for width in WIDTHS
        for kind in KINDS
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
    ]
