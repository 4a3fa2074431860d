"""What the engine launches of `merge_states`: the head sizes of common models. The result lies over the
second part, which must be read before."""

from __future__ import annotations

import torch
from chiron_kernels.gpu.launch import Launch
from chiron_kernels.gpu.merge_states import merge_states_launch

from scripts.kernel_gate.case import Case

HEAD_DIMS = (64, 80, 96, 128, 256)
LSE_LOADS = 6
"""Loads of under 16 bytes: of either part the logarithm of the two rows whose values a thread holds, and of
the one row whose result it stores."""

PLACE_LOADS = LSE_LOADS + 3
"""And the place of each of these rows."""


def _launch(head_dim: int, dtype: torch.dtype, placed: bool = False) -> Launch:
    values = torch.empty(64, 32, head_dim, dtype=dtype, device="meta")
    lse = torch.empty(64, 32, device="meta")
    places = torch.empty(64, dtype=torch.int64, device="meta") if placed else None
    return merge_states_launch(values, lse, values, lse, values, lse, places)


def cases() -> list[Case]:
    found = [
        Case(
            f"merge_states {head_dim} {short}",
            lambda h=head_dim, d=dtype: _launch(h, d),
            narrow_loads=LSE_LOADS,
            barrier=True,
        )
        for head_dim in HEAD_DIMS
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
    ]
    found += [
        Case(
            f"merge_states {head_dim} bf16 of some rows",
            lambda h=head_dim: _launch(h, torch.bfloat16, placed=True),
            narrow_loads=PLACE_LOADS,
            barrier=True,
        )
        for head_dim in HEAD_DIMS
    ]
    return found
