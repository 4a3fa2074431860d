"""The ceilings of a machine: copies on the device, between device and host, and a matrix product."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 5


def timed(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Median seconds of `work`, after two calls to warm up."""
    for _ in range(2):
        work()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_bandwidth(device: torch.device, size: int) -> dict[str, float]:
    """GB/s of large copies of `size` bytes. A copy on the device counts bytes read and written."""
    pinned = device.type == "cuda"
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.randint(0, 255, (size,), dtype=torch.uint8, pin_memory=pinned)
    return {
        "copy_bytes": size,
        "device_gb_per_s": 2e-9 * size / timed(lambda: target.copy_(source), device),
        "host_to_device_gb_per_s": 1e-9 * size / timed(lambda: target.copy_(host, non_blocking=True), device),
        "device_to_host_gb_per_s": 1e-9 * size / timed(lambda: host.copy_(source, non_blocking=True), device),
    }


def measure_matmul(device: torch.device, size: int, dtype: torch.dtype) -> dict[str, float | str]:
    """TFLOP/s of a square matrix product of random numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = timed(lambda: a @ b, device)
    return {
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "tflop_per_s": 2e-12 * size**3 / seconds,
    }
