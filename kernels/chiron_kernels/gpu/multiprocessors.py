"""How many multiprocessors a kernel is divided among."""

from __future__ import annotations

import functools

import torch

ASSUMED_MULTIPROCESSORS = 132
"""Of an H100 and an H200, where there is no GPU to ask: interpreted, or compiled ahead of time."""


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device, with its number. Asked once: a launch costs no more, captured or not."""
    if device.type != "cuda":
        return ASSUMED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
