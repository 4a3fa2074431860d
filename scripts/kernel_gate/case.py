"""A launch that the gate compiles, and what its machine code must show; and finding all of them."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chiron_kernels.gpu.launch import Launch

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True, slots=True)
class Case:
    """name: unique, starts with the kernel's. launch: called once for each of `architectures`, which are
    compute capabilities times 10; its tensors are on torch's `meta` device.

    What must hold on top of what holds for every kernel:
    narrow_loads: at most so many loads from global memory take under 16 bytes a thread. None: any number.
    matrix_units: there are matrix instructions of whole warp groups (HGMMA on 90, UTC*MMA on 100).
    tensor_loads: on 90 and up there are bulk tensor copies (UTMALDG).
    """

    name: str
    launch: Callable[[], Launch]
    architectures: tuple[int, ...] = ARCHITECTURES
    narrow_loads: int | None = None
    matrix_units: bool = False
    tensor_loads: bool = False


def case_modules() -> list[str]:
    """Every `<kernel>_cases.py` beside this file, by the name it is imported as."""
    return [f"{__package__}.{path.stem}" for path in sorted(Path(__file__).parent.glob("*_cases.py"))]


def load_cases(module: str) -> dict[str, Case]:
    """The cases of one module, by name. Raises ValueError for two of one name."""
    cases = importlib.import_module(module).cases()
    twice = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
    if twice:
        raise ValueError(f"{module} has more than one case {twice[0]!r}; each needs a name of its own")
    return {case.name: case for case in cases}
