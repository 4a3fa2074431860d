"""Copies of whole KV blocks between the device pool and the host pool.

A block is one row of either pool, so a copy moves rows. Copies are issued in order on the stream
of the forward pass: what a later step writes to a block that was copied out cannot overtake the
copy, and a forward pass sees every block copied in before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from chiron_engine.model.kv_pool import KvPool
from chiron_engine.policy.iteration.plan import BlockCopy


@dataclass(frozen=True, slots=True)
class Run:
    """`count` blocks that lie one after another in both pools."""

    device: int
    host: int
    count: int


def contiguous_runs(copies: Sequence[BlockCopy]) -> Iterator[Run]:
    """The copies, in their order, merged where both sides continue the run before."""
    if not copies:
        return
    first = previous = copies[0]
    count = 1
    for copy in copies[1:]:
        if copy.device == previous.device + 1 and copy.host == previous.host + 1:
            count += 1
        else:
            yield Run(first.device, first.host, count)
            first, count = copy, 1
        previous = copy
    yield Run(first.device, first.host, count)


@dataclass(frozen=True, slots=True)
class TransferTimes:
    """Seconds to copy one block each way, measured over `blocks` scattered blocks of `bytes_per_block`."""

    out_s: float
    in_s: float
    blocks: int
    bytes_per_block: int


class KvTransfer:
    """Copies between two pools of equal block size in bytes."""

    def __init__(self, device_pool: KvPool, host_pool: KvPool) -> None:
        if device_pool.bytes_per_block != host_pool.bytes_per_block:
            raise ValueError(
                f"a device block has {device_pool.bytes_per_block} bytes and a host block "
                f"{host_pool.bytes_per_block}; they must be equal"
            )
        self._device_pool = device_pool
        self._device = device_pool.storage
        self._host = host_pool.storage

    def copy_out(self, copies: Sequence[BlockCopy]) -> None:
        """Device to host."""
        for run in contiguous_runs(copies):
            source = self._device.narrow(0, run.device, run.count)
            self._host.narrow(0, run.host, run.count).copy_(source, non_blocking=True)

    def copy_in(self, copies: Sequence[BlockCopy]) -> None:
        """Host to device."""
        for run in contiguous_runs(copies):
            source = self._host.narrow(0, run.host, run.count)
            self._device.narrow(0, run.device, run.count).copy_(source, non_blocking=True)

    def measure(self, blocks: int = 16) -> TransferTimes:
        """Time copies of single scattered blocks. Overwrites blocks of both pools: only before use."""
        count = min(blocks, self._device.shape[0], self._host.shape[0])
        scattered = [BlockCopy(i, count - 1 - i) for i in range(count)]
        self.copy_out(scattered)
        self.copy_in(scattered)
        out_s = self._timed(lambda: self.copy_out(scattered)) / count
        in_s = self._timed(lambda: self.copy_in(scattered)) / count
        return TransferTimes(out_s, in_s, count, self._device_pool.bytes_per_block)

    def _timed(self, work: Callable[[], None]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.device.type == "cuda":
            torch.cuda.synchronize(self._device.device)
