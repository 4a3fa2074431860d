"""The linear layers of the native decoder."""

from __future__ import annotations

import ctypes
import sys

import torch
from chiron_kernels.cpu.int8_linear import int8_linear, pack_int8
from torch.nn.functional import linear

from chiron_engine.model.decoder_ops import DecoderOps
from chiron_engine.model.errors import ModelError

# Rows for which oneDNN chooses the layout of packed weights; other counts use the same layout.
_PACKED_FOR_ROWS = 32

# From this many rows on, a bfloat16 product costs more than widening the weight and multiplying in
# float32, on a CPU without matrix tiles (2 cores with AVX-512: 512 rows through SmolLM2's layers take
# 912 ms of CPU time against 1,320; 128 rows are even).
_WIDEN_FROM_ROWS = 256

_OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")


class Linear:
    """y = x W^T + b, x [T, in], W [out, in].

    On the CPU the weight is kept in oneDNN's blocked layout alone, which spares reordering it in
    every call; the dense one is not kept.
    """

    __slots__ = ("_bias", "_packed", "_weight", "_widen_from")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        self._packed = can_pack(weight)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        self._weight = weight
        self._widen_from = _WIDEN_FROM_ROWS if self._packed and widening_pays(weight.dtype) else sys.maxsize

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] >= self._widen_from:
            bias = None if self._bias is None else self._bias.float()
            return linear(x.float(), self._weight.to_dense(torch.float32), bias).to(x.dtype)
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return linear(x, self._weight, self._bias)


class GatedLinear:
    """silu(gate) * up, [T, out], where one product gives both: W [2 out, in], gates first."""

    __slots__ = ("_ops", "_product")

    def __init__(self, ops: DecoderOps, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._ops = ops
        self._product = Linear(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.gated_silu(self._product(x))


class Int8Linear:
    """`Linear`, or `GatedLinear`, with weights and activations of 8 bits, on a CPU with VNNI. What a row
    gives depends on that row alone, bit for bit."""

    __slots__ = ("_kernels", "_weight")

    def __init__(
        self,
        kernels: ctypes.CDLL,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        gated: bool = False,
    ) -> None:
        """gated: the product's first half are gates; silu(gate) * up comes out."""
        self._kernels = kernels
        try:
            self._weight = pack_int8(kernels, weight, bias, gated)
        except ValueError as error:
            raise ModelError(f"cannot round the model to int8: {error}") from None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return int8_linear(self._kernels, x, self._weight)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this build and this CPU have oneDNN's packed linear for the weight's type."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATIONS):
        return False
    if weight.dtype == torch.float32:
        return True
    return weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widening_pays(dtype: torch.dtype) -> bool:
    """Whether large products of this type are slower than float32 ones on this CPU."""
    return dtype == torch.bfloat16 and not torch.cpu.get_capabilities().get("amx_tile", False)
