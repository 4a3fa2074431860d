"""A kernel with everything it is launched with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.runtime.driver import driver

Grid = tuple[int, ...]
HOPPER = 90
"""As `target_architecture` gives it: the first with tensor descriptors and HGMMA."""


def target_architecture() -> int:
    """Compute capability of the GPU that kernels are for, times 10: 80, 90, 100. That is the current one: a
    process takes all its GPUs to be alike. The interpreter can do what Hopper can."""
    if triton.knobs.runtime.interpret:
        return HOPPER
    return _architecture(driver.active, driver.active.get_current_device())


@functools.cache
def _architecture(active: Any, device: int) -> int:
    """Of the device that is current. Asked once: the driver takes longer to answer than a launch may."""
    return int(active.get_current_target().arch)


def power_of_two_from(size: int) -> int:
    """The least power of two that is no less than size, 1 or more."""
    return 1 << (size - 1).bit_length()


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() > 1


@dataclass(slots=True, eq=False)
class Launch:
    """kernel: a `triton.jit` function. grid: programs along up to three axes. arguments: by name, constants
    included. num_warps: of 32 threads, for each program. num_stages: depth of the software pipeline.
    max_registers: of a thread; without it the assembler may keep values in memory to have room for one
    program more."""

    kernel: Any
    grid: Grid
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None

    def run(self) -> None:
        """Queue the kernel on the current stream of the GPU that the arguments lie on, current or not: a
        kernel launched on another one would not find them. A grid without programs queues nothing."""
        if 0 in self.grid:
            return
        gpu = self._gpu() if _several_gpus() else None
        if gpu is None or gpu == torch.cuda.current_device():
            self.kernel[self.grid](**self.arguments, **self._options())
            return
        with torch.cuda.device(gpu):
            self.kernel[self.grid](**self.arguments, **self._options())

    def compile(self) -> Any:
        """The compiled kernel for the current target, not launched."""
        return self.kernel.warmup(grid=self.grid, **self.arguments, **self._options())

    def _gpu(self) -> int | None:
        """The number of the GPU with the arguments, some of which may be in pinned memory of the host."""
        tensors = (each for each in self.arguments.values() if isinstance(each, torch.Tensor))
        return next((each.device.index for each in tensors if each.is_cuda), None)

    def _options(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}
