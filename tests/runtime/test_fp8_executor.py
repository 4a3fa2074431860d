"""The executor over KV of 8 bits, interpreted: mixed steps and a trip to the host, against torch over what
8 bits hold of the same keys and values."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plan_driver import trip_to_the_host

from chiron_engine.config import EngineConfig
from chiron_engine.model.precision import BFLOAT16
from chiron_engine.runtime.build import build_executor
from chiron_engine.runtime.torch_executor import TorchExecutor
from scripts.gpu_suite.random_llama import write_random_llama
from tests.model.quantised_attention import EIGHT_BITS, TIGHT_SCALES, reference, shortfall, write_scales
from tests.triton_interpreter import install

NEAR = 0.03
"""Relative to the largest logit: what bfloat16 may be off by."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    install()
    path = tmp_path_factory.mktemp("fp8") / "tiny"
    write_random_llama(path, "tiny", torch.device("cpu"))
    write_scales(path, TIGHT_SCALES)
    return path


def build(path: Path, **options: object) -> TorchExecutor:
    config = EngineConfig(
        str(path),
        dtype="bfloat16",
        kv_cache_dtype="fp8",
        device="cpu",
        kernels="triton",
        threads=1,
        kv_cache_memory=1 << 15,
        swap_space=1 << 14,
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )
    executor, _ = build_executor(replace(config, **options))
    return executor


@pytest.fixture
def executor(path: Path) -> Iterator[TorchExecutor]:
    built = build(path)
    yield built
    built.close()


def test_a_block_of_8_bits_takes_half_the_bytes(path: Path, executor: TorchExecutor) -> None:
    wide = build(path, kv_cache_dtype="auto")
    assert executor.device_pool.dtype == EIGHT_BITS
    assert 2 * executor.device_pool.bytes_per_block == wide.device_pool.bytes_per_block
    for blocks in ("num_device_blocks", "num_host_blocks"):
        assert getattr(executor.shape, blocks) == 2 * getattr(wide.shape, blocks)
    wide.close()


def test_mixed_steps_and_a_trip_to_the_host(path: Path, executor: TorchExecutor) -> None:
    executor.device_pool.storage.fill_(0xFF)  # NaN: what is read before it was written shows
    first, second = (
        [random.Random(n).randrange(500) for _ in range(length)] for n, length in ((0, 37), (1, 5))
    )
    found = trip_to_the_host(executor, first, second)
    assert [len(tokens) for tokens, _ in found] == [37 + 5 + 5, 5 + 12]
    right, unscaled = (reference(path, BFLOAT16, scales) for scales in (TIGHT_SCALES, {}))
    assert all(shortfall(right, tokens[:known], tokens[known:]) < NEAR for tokens, known in found)
    assert any(shortfall(unscaled, tokens[:known], tokens[known:]) > 3 * NEAR for tokens, known in found)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"kernels": "torch"},
            "kv_cache_dtype is 'fp8', which needs Triton's kernels; here kernels is 'torch'",
        ),
        (
            {"dtype": "float32"},
            "kv_cache_dtype is 'fp8', which is for dtype bfloat16 or float16; here dtype is",
        ),
        ({"dtype": "auto"}, "which is for dtype bfloat16 or float16; here dtype is float32"),
    ],
)
def test_where_it_cannot_be_is_refused(options: dict[str, str], says: str, path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        build(path, **options)
