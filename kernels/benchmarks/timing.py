"""Times on a GPU: calls in a CUDA graph, replayed.

In a graph kernels follow one another as in a step of the engine, without what Python and the driver take to
launch them. The calls of a graph work on different data, more than the L2 cache holds, so each reads from
memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.case import Work

REPLAYS = 50
"""Times of which the median counts."""

WARM_UP_REPLAYS = 3
LEAST_COPIES, MOST_COPIES = 4, 64
CACHE_SHARE = 2.0
"""The data of all calls of a graph, in sizes of the L2 cache."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median over replays, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float


def copies_for(call_bytes: int, device: torch.device) -> int:
    """How many calls, each on `call_bytes` of its own, leave nothing of the first in the cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = int(CACHE_SHARE * cache // max(call_bytes, 1)) + 1
    return min(max(wanted, LEAST_COPIES), MOST_COPIES)


def time_calls(calls: Sequence[Callable[[], Any]]) -> Timing:
    """Of one call, on the current device. Kernels are compiled before they are captured."""
    graph = _captured(calls)
    for _ in range(WARM_UP_REPLAYS):
        graph.replay()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    milliseconds = [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]
    seconds = [value / 1e3 / len(calls) for value in milliseconds]
    deciles = statistics.quantiles(seconds, n=10)
    return Timing(statistics.median(seconds), deciles[0], deciles[-1])


def _captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device does at most: bytes/s read and written by a large copy, flops/s of a large bfloat16
    product, bytes/s from the device to pinned memory."""

    copy: float
    product: float
    to_host: float

    def least_seconds(self, work: Work) -> dict[str, float]:
        """That no kernel can do without, by what takes them."""
        return {
            "bytes": work.bytes / self.copy,
            "operations": work.flops / self.product,
            "bus": work.bus_bytes / self.to_host,
        }


COPY_BYTES = 1 << 30
PRODUCT_SIZE = 8192


def measure_ceilings(device: torch.device) -> Ceilings:
    """By the same clock as the kernels."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    a, b, c = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device).to(torch.bfloat16) for _ in range(3))
    copy = time_calls([lambda: target.copy_(source)]).median
    product = time_calls([lambda: torch.mm(a, b, out=c)]).median
    to_host = time_calls([lambda: host.copy_(source, non_blocking=True)]).median
    return Ceilings(2 * COPY_BYTES / copy, 2 * PRODUCT_SIZE**3 / product, COPY_BYTES / to_host)
