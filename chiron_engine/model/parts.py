"""What the layers of a native model are made of, by precision, device and kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from chiron_engine.model.attention import AttentionBackend, TorchAttention
from chiron_engine.model.compiled_attention import CompiledAttention
from chiron_engine.model.decoder_ops import CompiledOps, DecoderOps, TorchOps
from chiron_engine.model.kernel_choice import Kernels, library_of
from chiron_engine.model.kv_scales import LayerScales
from chiron_engine.model.linear import GatedLinear, Int8Linear, Linear
from chiron_engine.model.precision import Precision
from chiron_engine.model.self_attention import Heads, SelfAttention, SteppedSelfAttention

AnyLinear = Callable[[torch.Tensor], torch.Tensor]
MakeLinear = Callable[..., AnyLinear]


@dataclass(frozen=True, slots=True)
class Parts:
    """linear, gated: called with a weight, and a bias where there is one. backend: of which
    `self_attention` makes use."""

    ops: DecoderOps
    linear: MakeLinear
    gated: MakeLinear
    backend: AttentionBackend
    self_attention: Callable[[Heads], SelfAttention]


def parts_for(
    precision: Precision, device: torch.device, kernels: Kernels, scales: LayerScales | None = None
) -> Parts:
    """scales: of a KV pool of 8 bits. Raises ValueError for int8 weights without compiled kernels."""
    if kernels is Kernels.TRITON:
        return _triton_parts(precision, scales)
    library = library_of(kernels, device)
    narrow = library is None or precision.compute != torch.float32
    ops: DecoderOps = TorchOps() if narrow or library is None else CompiledOps(library)
    backend = backend_for(kernels, device)
    stepped = functools.partial(SteppedSelfAttention, ops=ops, backend=backend)
    if not precision.int8_weights:
        return Parts(ops, Linear, functools.partial(GatedLinear, ops), backend, stepped)
    if library is None:
        raise ValueError(f"int8 weights need the compiled CPU kernels, not those of {kernels.value}")
    linear = functools.partial(Int8Linear, library)
    return Parts(ops, linear, functools.partial(linear, gated=True), backend, stepped)


def backend_for(
    kernels: Kernels, device: torch.device, scales: LayerScales | None = None
) -> AttentionBackend:
    """The attention of these kernels. scales: of a KV pool of 8 bits, which Triton's alone take."""
    if kernels is Kernels.TRITON:
        from chiron_engine.model.triton_attention import TritonAttention

        return TritonAttention(scales)
    library = library_of(kernels, device)
    return TorchAttention() if library is None else CompiledAttention(library)


def _triton_parts(precision: Precision, scales: LayerScales | None) -> Parts:
    # Imported here: triton takes a second to load, and is not there on every machine without a GPU.
    from chiron_engine.model.triton_attention import LARGEST_HEAD, FusedSelfAttention, TritonAttention
    from chiron_engine.model.triton_ops import TritonOps

    if precision.int8_weights:
        raise ValueError("int8 weights need the compiled CPU kernels; take --kernels compiled")
    ops, backend = TritonOps(), TritonAttention(scales)

    def self_attention(heads: Heads) -> SelfAttention:
        if heads.dim > LARGEST_HEAD:
            return SteppedSelfAttention(heads, ops, backend)
        return FusedSelfAttention(heads, backend)

    return Parts(ops, Linear, functools.partial(GatedLinear, ops), backend, self_attention)
