"""Block copies: grouping, direction, order."""

from __future__ import annotations

import pytest
import torch

from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.spec import LayerGeometry
from chiron_engine.policy.iteration.plan import BlockCopy
from chiron_engine.runtime.kv_transfer import (
    MANY_RUNS,
    SHORT_RUN_BYTES,
    KvTransfer,
    Run,
    contiguous_runs,
    copies_by_kernel,
)

LAYERS = (LayerGeometry(2, 8), LayerGeometry(1, 16))


def make_pools() -> tuple[KvPool, KvPool]:
    device, host = KvPool(10, 4, LAYERS, torch.float32), KvPool(8, 4, LAYERS, torch.float32)
    device.storage.view(torch.float32).normal_()
    host.storage.view(torch.float32).normal_()
    return device, host


@pytest.mark.parametrize(
    ("pairs", "runs"),
    [
        ([], []),
        ([(3, 4)], [Run(3, 4, 1)]),
        ([(3, 4), (4, 5), (5, 6)], [Run(3, 4, 3)]),
        ([(3, 4), (4, 6), (5, 7)], [Run(3, 4, 1), Run(4, 6, 2)]),
        ([(5, 4), (4, 5)], [Run(5, 4, 1), Run(4, 5, 1)]),
    ],
)
def test_runs(pairs: list[tuple[int, int]], runs: list[Run]) -> None:
    assert list(contiguous_runs([BlockCopy(d, h) for d, h in pairs])) == runs


SCATTERED = [BlockCopy(2 * i, 3 * i) for i in range(2 * MANY_RUNS)]


@pytest.mark.parametrize(
    ("copies", "num_runs", "bytes_per_block", "expected"),
    [
        (SCATTERED, len(SCATTERED), 64, True),
        (SCATTERED, len(SCATTERED), SHORT_RUN_BYTES - 64, True),
        (SCATTERED, len(SCATTERED), SHORT_RUN_BYTES, False),
        (SCATTERED, MANY_RUNS, SHORT_RUN_BYTES // 4, True),
        (SCATTERED, MANY_RUNS, SHORT_RUN_BYTES // 2, False),
        (SCATTERED, MANY_RUNS - 1, 64, False),
        ([*SCATTERED, BlockCopy(999, 3)], len(SCATTERED) + 1, 64, False),
        ([*SCATTERED, BlockCopy(2, 999)], len(SCATTERED) + 1, 64, False),
        ([], 0, 64, False),
    ],
)
def test_many_short_runs_are_for_the_kernel(
    copies: list[BlockCopy], num_runs: int, bytes_per_block: int, expected: bool
) -> None:
    assert copies_by_kernel(copies, num_runs, bytes_per_block) == expected


def test_blocks_travel_out_and_in() -> None:
    device, host = make_pools()
    before, host_before = device.storage.clone(), host.storage.clone()
    transfer = KvTransfer(device, host)
    transfer.copy_out([BlockCopy(1, 5), BlockCopy(2, 6), BlockCopy(9, 0)])
    assert torch.equal(host.storage[[5, 6, 0]], before[[1, 2, 9]])
    assert torch.equal(host.storage[[1, 2, 3, 4, 7]], host_before[[1, 2, 3, 4, 7]])
    transfer.copy_in([BlockCopy(7, 5), BlockCopy(0, 6)])
    assert torch.equal(device.storage[[7, 0]], before[[1, 2]])
    assert torch.equal(device.k(0)[7], device.k(0)[1])
    assert torch.equal(device.storage[[1, 2, 3, 4, 5, 6, 8, 9]], before[[1, 2, 3, 4, 5, 6, 8, 9]])


def test_pools_of_different_blocks_are_refused() -> None:
    device, _ = make_pools()
    other = KvPool(3, 8, LAYERS, torch.float32)
    with pytest.raises(ValueError, match=f"{device.bytes_per_block} bytes.*{other.bytes_per_block}"):
        KvTransfer(device, other)


def test_measured_times_are_of_the_blocks_there_are() -> None:
    device, host = make_pools()
    times = KvTransfer(device, host).measure(blocks=64)
    assert times.blocks == 8
    assert times.bytes_per_block == device.bytes_per_block
    assert times.out_s > 0
    assert times.in_s > 0
