"""The executor over KV of 8 bits, interpreted: mixed steps and a trip to the host, against torch over what
8 bits hold of the same keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from plan_driver import PlanDriver

from chiron_engine.config import EngineConfig
from chiron_engine.model.kv_scales import KvScales
from chiron_engine.model.precision import BFLOAT16
from chiron_engine.runtime.build import build_executor
from chiron_engine.runtime.torch_executor import TorchExecutor
from tests.cli.tiny_llama import write_tiny_llama
from tests.model.quantised_attention import EIGHT_BITS, reference, shortfall, write_scales
from tests.triton_interpreter import install

SCALES = {0: KvScales(1 / 40, 1 / 60), 1: KvScales(1 / 90, 1 / 30)}
"""So small that many keys and values are over the largest number: without them the tokens are others."""

NEAR = 0.03
"""Relative to the largest logit: what bfloat16 may be off by."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    install()
    path = write_tiny_llama(tmp_path_factory.mktemp("fp8") / "tiny")
    write_scales(path, SCALES)
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
    driver = PlanDriver(executor)
    prompts = [[(7 * i + 3 * n) % 250 for i in range(length)] for n, length in enumerate((37, 5, 50))]
    first, second = driver.join(1, prompts[0]), driver.join(2, prompts[1])
    driver.step({1: 16, 2: 5})
    driver.step({1: 21})
    for _ in range(4):
        driver.step()
    tokens, host = driver.evict(1)
    assert len(host) == 2
    third = driver.join(3, prompts[2])
    assert set(third.blocks) & set(first.blocks)
    driver.step({3: 50})
    resumed = driver.join(4, tokens, saved=host)
    driver.step({4: len(tokens) - resumed.computed})
    for _ in range(3):
        driver.step()
    right, unscaled = (reference(path, BFLOAT16, scales) for scales in (SCALES, {}))
    lives = ((resumed, 37), (second, 5), (third, 50))
    assert all(shortfall(right, live.tokens[:known], live.tokens[known:]) < NEAR for live, known in lives)
    assert any(
        shortfall(unscaled, live.tokens[:known], live.tokens[known:]) > 3 * NEAR for live, known in lives
    )
    assert len(resumed.tokens) == 37 + 5 + 4


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
