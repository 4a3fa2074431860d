"""A launch that the gate compiles, and what its machine code must show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chiron_kernels.gpu.launch import Launch

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True, slots=True)
class Case:
    """launch: called once for each architecture, with tensors on torch's `meta` device. narrow_loads: no more
    than so many loads from global memory of under 16 bytes a thread; None does not look. matrix_units: the
    matrix instructions of Hopper and Blackwell are there (HGMMA, UTC*MMA). tensor_loads: the bulk tensor
    copies of Hopper are there (UTMALDG)."""

    name: str
    launch: Callable[[], Launch]
    architectures: tuple[int, ...] = ARCHITECTURES
    narrow_loads: int | None = None
    matrix_units: bool = False
    tensor_loads: bool = False
