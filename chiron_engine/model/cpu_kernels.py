"""The compiled CPU kernels, where this machine can have them."""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from chiron_kernels.cpu.library import KernelsUnavailable, has_vnni, open_library

from chiron_engine.model.cache import cache_dir

logger = logging.getLogger(__name__)


@functools.cache
def open_kernels() -> ctypes.CDLL | str:
    """The kernels, or why there are none. The first call on a machine compiles them."""
    try:
        return open_library(cache_dir() / "kernels")
    except (KernelsUnavailable, OSError, RuntimeError) as error:  # no home, or one that cannot be searched
        logger.warning("no compiled CPU kernels, torch's instead: %s", error)
        return str(error)


def kernels_for(device: torch.device) -> ctypes.CDLL | None:
    """The kernels if they serve this device."""
    if device.type != "cpu":
        return None
    found = open_kernels()
    return None if isinstance(found, str) else found


def why_not_int8(device: torch.device) -> str | None:
    """What int8 lacks here; None where it can run."""
    if device.type != "cpu":
        return "it is for the CPU"
    found = open_kernels()
    if isinstance(found, str):
        return found
    return None if has_vnni() else "the CPU lacks avx512_vnni, without which 8-bit sums saturate"
