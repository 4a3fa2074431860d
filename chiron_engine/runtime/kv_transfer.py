"""Copies of whole KV blocks between the device pool and the host pool.

A block is one row of either pool, so a copy moves rows. Copies are issued in order on the stream
of the forward pass: what a later step writes to a block that was copied out cannot overtake the
copy, and a forward pass sees every block copied in before it.

A run of blocks is one copy by the device's copy engine. Many short runs are one launch of a kernel instead:
giving each to the copy engine takes the processor longer than the copy lasts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from chiron_engine.model.kv_pool import KvPool
from chiron_engine.policy.iteration.plan import BlockCopy

SHORT_RUN_BYTES = 256 << 10
"""Runs of less on average may go by the kernel. At the 50 GB/s that copy engines reach over PCIe 5, 256 KiB
last 5 us, about what it takes to issue a copy; longer runs keep the engine busy, and leave the
multiprocessors to the model. Published figures and estimates: nothing was timed here."""
MANY_RUNS = 16
"""Fewer take no longer to issue than one launch of the kernel, some 80 us."""

CopyBlocks = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""source, source_rows, target, target_rows: as `chiron_kernels.gpu.block_copy.copy_blocks`."""


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


def copies_by_kernel(copies: Sequence[BlockCopy], num_runs: int, bytes_per_block: int) -> bool:
    """Whether the copies, all of one direction and in so many runs, are for the kernel: it makes them in no
    order, so no block may be written twice."""
    if num_runs < MANY_RUNS or len(copies) * bytes_per_block >= num_runs * SHORT_RUN_BYTES:
        return False
    return len({c.device for c in copies}) == len({c.host for c in copies}) == len(copies)


class KvTransfer:
    """Copies between two pools of equal block size in bytes.

    copy_blocks: for many short runs, where there is a kernel that reaches both pools."""

    def __init__(self, device_pool: KvPool, host_pool: KvPool, copy_blocks: CopyBlocks | None = None) -> None:
        if device_pool.bytes_per_block != host_pool.bytes_per_block:
            raise ValueError(
                f"a device block has {device_pool.bytes_per_block} bytes and a host block "
                f"{host_pool.bytes_per_block}; they must be equal"
            )
        self._device_pool = device_pool
        self._device = device_pool.storage
        self._host = host_pool.storage
        self._copy_blocks = copy_blocks

    def copy_out(self, copies: Sequence[BlockCopy]) -> None:
        """Device to host."""
        runs = list(contiguous_runs(copies))
        if self._copy_blocks is not None and self._for_kernel(copies, runs):
            device, host = self._rows(copies)
            self._copy_blocks(self._device, device, self._host, host)
            return
        for run in runs:
            source = self._device.narrow(0, run.device, run.count)
            self._host.narrow(0, run.host, run.count).copy_(source, non_blocking=True)

    def copy_in(self, copies: Sequence[BlockCopy]) -> None:
        """Host to device."""
        runs = list(contiguous_runs(copies))
        if self._copy_blocks is not None and self._for_kernel(copies, runs):
            device, host = self._rows(copies)
            self._copy_blocks(self._host, host, self._device, device)
            return
        for run in runs:
            source = self._host.narrow(0, run.host, run.count)
            self._device.narrow(0, run.device, run.count).copy_(source, non_blocking=True)

    def _for_kernel(self, copies: Sequence[BlockCopy], runs: Sequence[Run]) -> bool:
        return copies_by_kernel(copies, len(runs), self._device_pool.bytes_per_block)

    def _rows(self, copies: Sequence[BlockCopy]) -> torch.Tensor:
        """int64 [2, count] on the device: the rows there, and those of the host."""
        rows = torch.tensor([[c.device for c in copies], [c.host for c in copies]])
        if self._device.device.type != "cuda":
            return rows
        return rows.pin_memory().to(self._device.device, non_blocking=True)

    def launch_kernel(self) -> None:
        """Have the kernel, where there is one, copy a block each way. Overwrites the first block of both
        pools: only before use."""
        if self._copy_blocks is None:
            return
        device, host = self._rows([BlockCopy(0, 0)])
        self._copy_blocks(self._device, device, self._host, host)
        self._copy_blocks(self._host, host, self._device, device)

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
