"""The activation of a gated feed-forward layer."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, silu


def gated_activation(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up, [T, I], of gate_up [T, 2 I], in float32, rounded once. kind: silu, gelu, gelu_tanh."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    if kind == "silu":
        activated = silu(gate)
    else:
        activated = gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return (activated * up).to(gate_up.dtype)
