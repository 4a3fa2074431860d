"""What the prefill attention is launched with, by shapes alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from chiron_kernels.gpu.multiprocessors import multiprocessors
from chiron_kernels.gpu.prefill_plan import (
    LEAST_SPLIT_KEYS,
    PrefillShape,
    aligned_for_tensor_copies,
    choose_splits,
    tiling,
)


def shape(head_dim: int = 128, block_size: int = 64) -> PrefillShape:
    return PrefillShape(tokens=32, chunks=1, heads=32, kv_heads=8, head_dim=head_dim, block_size=block_size)


@pytest.mark.parametrize(
    ("blocks", "max_len", "window", "splits"),
    [
        (1, 32768, None, 16),  # 8 programs on 132 multiprocessors
        (2, 32768, None, 8),
        (1, LEAST_SPLIT_KEYS * 3, None, 3),
        (1, LEAST_SPLIT_KEYS - 1, None, 1),
        (1, 32768, 1024, 2),
        (1, None, None, 16),
        (9, 32768, None, 1),
        (100, 32768, None, 1),
    ],
)
def test_few_blocks_share_their_keys(
    blocks: int, max_len: int | None, window: int | None, splits: int
) -> None:
    assert choose_splits(shape(), blocks, 2048, max_len, window, 132) == splits


@pytest.mark.parametrize(("available", "splits"), [(46, 5), (108, 13), (132, 16), (148, 16)])
def test_a_smaller_gpu_gets_fewer_splits(available: int, splits: int) -> None:
    assert choose_splits(shape(), 1, 2048, 32768, None, available) == splits


def test_multiprocessors_are_asked_of_each_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(multi_processor_count=100 + device.index)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    multiprocessors.cache_clear()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    counts = [multiprocessors(device) for device in (first, second, first)]
    multiprocessors.cache_clear()
    assert counts == [100, 101, 100] and asked == [first, second]
    assert multiprocessors(torch.device("cpu")) == multiprocessors(torch.device("meta")) == 132


@pytest.mark.parametrize(
    ("block_size", "head_dim", "architecture", "by_tensor"),
    [
        (64, 128, 90, True),
        (16, 128, 90, False),
        (64, 128, 80, False),
        (64, 34, 90, False),
        (32, 256, 90, True),
    ],
)
def test_tensor_copies_where_a_tile_lies_in_a_block(
    block_size: int, head_dim: int, architecture: int, by_tensor: bool
) -> None:
    kv = torch.empty(3, block_size, 2, 8, head_dim, dtype=torch.float16, device="meta")
    given = shape(head_dim, block_size)
    assert tiling(given, 64, kv, architecture).by_tensor == by_tensor


def test_a_pool_off_16_bytes_takes_no_tensor_copies() -> None:
    memory = torch.zeros(2 * 64 * 2 * 64 + 8, dtype=torch.float16)
    dense = memory[: 2 * 64 * 2 * 64].view(2, 64, 2, 1, 64)
    assert aligned_for_tensor_copies(dense) == (dense.data_ptr() % 16 == 0)
    off = memory[1 : 2 * 64 * 2 * 64 + 1].view(2, 64, 2, 1, 64)
    assert aligned_for_tensor_copies(off) == (off.data_ptr() % 16 == 0)
    assert aligned_for_tensor_copies(dense) != aligned_for_tensor_copies(off)
