"""Sizes of the KV pools, and the refusals that name numbers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from chiron_engine.config import GIB, EngineConfig
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.runtime import host_memory
from chiron_engine.runtime.errors import OutOfMemory
from chiron_engine.runtime.host_memory import (
    KEPT_ALLOCATION,
    M_MMAP_THRESHOLD,
    available_bytes,
    keep_freed_memory,
)
from chiron_engine.runtime.kv_sizing import check_config, choose_block_size, default_cpu_pool, size_kv

BLOCK = 16
CONFIG = EngineConfig("m", swap_space=10_000, max_num_seqs=4)
BLOCK_BYTES = 1000


def test_blocks_fill_the_pool_that_was_asked_for() -> None:
    sizes = size_kv(replace(CONFIG, kv_cache_memory=1), BLOCK, 64, BLOCK_BYTES, 123_456)
    assert (sizes.device_blocks, sizes.host_blocks, sizes.max_model_len) == (123, 10, 64)
    assert sizes.tokens == 1968
    assert "1,968 tokens" in sizes.describe()


def test_a_default_pool_is_no_larger_than_the_requests_can_use() -> None:
    assert size_kv(CONFIG, BLOCK, 64, BLOCK_BYTES, 123_456).device_blocks == 4 * 4


def test_the_context_shrinks_to_the_pool_unless_it_was_asked_for() -> None:
    assert size_kv(CONFIG, BLOCK, 8192, BLOCK_BYTES, 20_500).max_model_len == 320
    with pytest.raises(OutOfMemory, match=r"8192 tokens \(512 blocks of 1,000 bytes\)") as caught:
        size_kv(replace(CONFIG, max_model_len=8192), BLOCK, 8192, BLOCK_BYTES, 20_500)
    assert (caught.value.needed, caught.value.available) == (512_000, 20_500)


def test_a_pool_of_no_use_is_refused() -> None:
    with pytest.raises(OutOfMemory, match="kv_cache_memory"):
        size_kv(CONFIG, BLOCK, 8192, BLOCK_BYTES, 1999)


def test_a_context_over_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_model_len is 65; .* at most 64"):
        size_kv(replace(CONFIG, max_model_len=65), BLOCK, 64, BLOCK_BYTES, 123_456)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens is 3 and max_num_seqs 4"),
        ({"max_model_len": 1}, "max_model_len is 1"),
        ({"kv_cache_memory": 0}, "kv_cache_memory is 0"),
        ({"swap_space": -1}, "swap_space is -1"),
        ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization is 1.01"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization is nan"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, object], message: str) -> None:
    check_config(CONFIG)
    with pytest.raises(ValueError, match=message):
        check_config(replace(CONFIG, **change))


def test_blocks_are_of_the_size_asked_for_or_the_best_for_the_kernels() -> None:
    assert [choose_block_size(CONFIG, kernels) for kernels in Kernels] == [16, 64, 16]
    odd = replace(CONFIG, block_size=24)
    assert choose_block_size(odd, Kernels.TORCH) == 24
    with pytest.raises(ValueError, match="block_size is 24; for Triton's kernels it must be a power of two"):
        choose_block_size(odd, Kernels.TRITON)


def test_default_cpu_pool() -> None:
    assert default_cpu_pool(100 * GIB) == 2 * GIB
    assert default_cpu_pool(4 * GIB) == GIB


def test_available_memory_heeds_the_control_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 999 kB\nMemAvailable:     500 kB\n")
    assert available_bytes(meminfo, tmp_path) == 500 * 1024
    (tmp_path / "memory.max").write_text("100000\n")
    (tmp_path / "memory.current").write_text("70000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 2000\n")
    assert available_bytes(meminfo, tmp_path) == 32_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 500 * 1024


def test_a_system_that_does_not_say_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 999 kB\n")
    with pytest.raises(OSError, match="MemAvailable"):
        available_bytes(tmp_path / "meminfo", tmp_path)


def test_this_machine_has_memory() -> None:
    assert available_bytes() > 1 << 20


def test_freed_memory_is_kept_unless_the_user_chose_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Libc:
        def mallopt(self, parameter: int, value: int) -> None:
            asked.append((parameter, value))

    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "4096")
    keep_freed_memory()
    assert asked == []
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    keep_freed_memory()
    assert (M_MMAP_THRESHOLD, KEPT_ALLOCATION) in asked
