"""What computes attention, what lies between the matrix products, and samples: kernels compiled for this CPU,
Triton's for a GPU, or torch alone, which is the reference of both."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from enum import Enum

import torch

from chiron_engine.config import KERNELS
from chiron_engine.model.cpu_kernels import kernels_for, open_kernels

INTERPRETED = "TRITON_INTERPRET"


class Kernels(Enum):
    """Named as `--kernels` has them."""

    COMPILED = "compiled"
    TRITON = "triton"
    TORCH = "torch"


def best_kernels(device: torch.device) -> Kernels:
    """What `auto` means on this device."""
    if device.type == "cpu":
        return Kernels.TORCH if kernels_for(device) is None else Kernels.COMPILED
    return Kernels.TORCH if why_not_triton(device) else Kernels.TRITON


def library_of(kernels: Kernels, device: torch.device) -> ctypes.CDLL | None:
    """What was compiled for this CPU, where that is in use."""
    return kernels_for(device) if kernels is Kernels.COMPILED else None


def named_kernels(name: str, device: torch.device) -> Kernels:
    """Raises ValueError for what does not run on this device."""
    if name not in KERNELS:
        raise ValueError(f"kernels is {name!r}; it must be one of {', '.join(KERNELS)}")
    if name == "auto":
        return best_kernels(device)
    kernels = Kernels(name)
    reason = _LACKS[kernels](device)
    if reason is not None:
        raise ValueError(f"kernels is {name!r}, which cannot run on {device}: {reason}")
    return kernels


def why_not_triton(device: torch.device) -> str | None:
    """What Triton's kernels lack here; None where they can run. On the CPU they are interpreted, for tests
    only: thousands of times slower."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu" and os.environ.get(INTERPRETED) != "1":
        return f"they need a GPU ({INTERPRETED}=1 has them interpreted)"
    return None


def _why_not_compiled(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "they are for the CPU"
    found = open_kernels()
    return found if isinstance(found, str) else None


_LACKS = {
    Kernels.COMPILED: _why_not_compiled,
    Kernels.TRITON: why_not_triton,
    Kernels.TORCH: lambda device: None,
}
