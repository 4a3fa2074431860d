"""Kernels that the compile gate must refuse, for its tests."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from chiron_kernels.gpu.launch import Launch

from scripts.kernel_gate.case import Case


@triton.jit
def _centre(x, y, TILE: tl.constexpr):
    """All of the tile is needed twice, so it has to stay in registers in between."""
    offsets = tl.arange(0, TILE)
    value = tl.load(x + offsets)
    tl.store(y + offsets, value - tl.sum(value, axis=0) / TILE)


@triton.jit
def _unknown_name(x, y, TILE: tl.constexpr):
    tl.store(y, tl.load(x) + undefined)  # noqa: F821


def _launch(kernel, tile: int) -> Launch:
    x = torch.empty(tile, dtype=torch.float32, device="meta")
    return Launch(kernel, (1,), {"x": x, "y": x, "TILE": tile}, num_warps=1)


def _two_bytes_apart() -> Launch:
    """A pointer that is not known to be divisible by 16."""
    x = torch.empty(1025, dtype=torch.float16, device="meta")[1:]
    return Launch(_centre, (1,), {"x": x, "y": x, "TILE": 1024}, num_warps=1)


def _crash() -> Launch:
    """As a compiler does that runs into its own assertion."""
    os.write(2, b"assertion failed in a pass\n")
    os._exit(9)


def cases() -> list[Case]:
    return [
        # 8,192 numbers of 32 bits over 32 threads are 256 registers a thread, which has 255.
        Case("spills", lambda: _launch(_centre, 8192), architectures=(90,)),
        Case("loads narrowly", _two_bytes_apart, architectures=(90,), narrow_loads=0),
        Case("crashes", _crash, architectures=(90,)),
        Case("does not compile", lambda: _launch(_unknown_name, 64), architectures=(90,)),
    ]
