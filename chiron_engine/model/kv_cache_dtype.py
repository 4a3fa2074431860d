"""What the KV pool holds keys and values as, where that is not what the model computes with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from chiron_kernels.gpu.paged_kv import EIGHT_BITS, LARGEST_HEAD

from chiron_engine.config import KV_CACHE_DTYPES
from chiron_engine.model.errors import ModelError
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.precision import Precision
from chiron_engine.model.spec import LayerGeometry

ADA = (8, 9)
"""The first GPUs with 8-bit floats."""


def check_kv_cache_dtype(name: str, kernels: Kernels, device: torch.device) -> None:
    """Raises ValueError for a name that is none, and for what these kernels or this device cannot hold."""
    if name not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype is {name!r}; it must be one of {', '.join(KV_CACHE_DTYPES)}")
    if name == "auto":
        return
    if kernels is not Kernels.TRITON:
        raise ValueError(
            f"kv_cache_dtype is {name!r}, which needs Triton's kernels; here kernels is {kernels.value!r}, "
            "for which it must be auto"
        )
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < ADA:
        raise ValueError(
            f"kv_cache_dtype is {name!r}, which needs a GPU of compute capability 8.9 or more; {device} has "
            f"{'.'.join(map(str, capability))}, for which it must be auto"
        )


def with_kv_cache_dtype(precision: Precision, name: str) -> Precision:
    """The precision with a pool of this dtype, one that `check_kv_cache_dtype` lets pass. Raises ValueError
    for 8 bits where the model computes in float32."""
    if name == "auto":
        return precision
    if precision.compute == torch.float32:
        raise ValueError(
            f"kv_cache_dtype is {name!r}, which is for dtype bfloat16 or float16; here dtype is "
            f"{precision.name}"
        )
    return replace(precision, kv=EIGHT_BITS)


def check_kv_heads(layers: Iterable[LayerGeometry], precision: Precision) -> None:
    """Raises ModelError for a pool of 8 bits where heads are larger than the kernels take: what computes
    these reads no such pool."""
    largest = max(layer.head_dim for layer in layers)
    if precision.kv == EIGHT_BITS and largest > LARGEST_HEAD:
        raise ModelError(
            f"kv_cache_dtype fp8 is for heads of up to {LARGEST_HEAD}, and this model's are of {largest}; "
            "take kv_cache_dtype auto"
        )
