"""The one linear layer of the native decoder."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

# Rows for which oneDNN chooses the layout of packed weights; other counts use the same layout.
_PACKED_FOR_ROWS = 32


class Linear:
    """y = x W^T + b, x [T, in], W [out, in].

    On the CPU the weight is kept in oneDNN's blocked layout alone, which spares reordering it in
    every call; the dense one is not kept.
    """

    __slots__ = ("_bias", "_packed", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        self._packed = can_pack(weight)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return linear(x, self._weight, self._bias)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this build and this CPU have oneDNN's packed linear for the weight's type."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.float32:
        return True
    return weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
