"""A launch that the gate compiles, and what its machine code must show; and finding all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chiron_kernels.gpu.launch import Launch

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True, slots=True)
class Case:
    """name: starts with the kernel's; unique on each architecture, so that a kernel which is another one on
    another architecture may keep its name. launch: called once for each of `architectures`, which are compute
    capabilities times 10; its tensors are on torch's `meta` device.

    What must hold on top of what holds for every kernel:
    narrow_loads: at most so many loads from global memory take under 16 bytes a thread. None: any number.
    matrix_units: there are matrix instructions of whole warp groups (HGMMA on 90, UTC*MMA on 100).
    tensor_loads: on 90 and up there are bulk tensor copies (UTMALDG).
    barrier: the threads of a program wait for one another (BAR).
    """

    name: str
    launch: Callable[[], Launch]
    architectures: tuple[int, ...] = ARCHITECTURES
    narrow_loads: int | None = None
    matrix_units: bool = False
    tensor_loads: bool = False
    barrier: bool = False


def case_modules() -> list[str]:
    """Every `<kernel>_cases.py` beside this file, by the name it is imported as."""
    return [f"{__package__}.{path.stem}" for path in sorted(Path(__file__).parent.glob("*_cases.py"))]


def load_cases(module: str) -> dict[tuple[str, int], Case]:
    """The cases of one module, by name and architecture. Raises ValueError for two of the same."""
    found: dict[tuple[str, int], Case] = {}
    for case in importlib.import_module(module).cases():
        for architecture in case.architectures:
            if found.setdefault((case.name, architecture), case) is not case:
                raise ValueError(f"{module} has two cases {case.name!r} for sm_{architecture}")
    return found
