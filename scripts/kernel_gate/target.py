"""Compiling for a GPU that is not there.

Triton asks its driver which GPU the kernels are for. Here it is told, so that `Launch.compile` goes through
the same specialisation (alignment of pointers, sizes divisible by 16) as a launch on that GPU.
"""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

WARP_SIZE = 32


class AbsentGpu:
    """What Triton's compiler asks a driver. architecture: 80, 90, 100."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, WARP_SIZE)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise RuntimeError("nothing runs on a GPU that is not there")


def compile_for(architecture: int) -> None:
    """From now on, in this process, kernels are compiled for GPUs of this architecture."""
    driver.set_active(AbsentGpu(architecture))
