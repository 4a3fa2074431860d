"""An engine compiles no kernel once it serves: whatever it may launch, it has launched before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from serving_mix import ServingMix

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.runtime import build
from chiron_engine.runtime.build import build_executor
from chiron_engine.runtime.kernel_variants import launch_all_variants
from scripts.gpu_suite.random_llama import SHAPES, write_random_llama
from tests.specialisations import LaunchRecord, record_launches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu counts what is compiled")

SHAPE = SHAPES["tiny"] | {"max_position_embeddings": 2048}
MODELS = {
    "usual sizes": SHAPE,
    "rows of logits off 16 bytes": SHAPE | {"vocab_size": 258},
    "odd vocabulary, groups of 3": SHAPE | {"vocab_size": 257, "hidden_size": 96, "num_attention_heads": 6},
}
CAPACITIES: dict[str, dict[str, int]] = {
    "as usual": {"max_num_seqs": 40},
    "many requests": {"max_num_seqs": 150},
    "few requests": {"max_num_seqs": 3},
    "short steps": {"max_num_seqs": 2, "max_num_batched_tokens": 5},
    "short contexts": {"max_model_len": 60, "max_num_seqs": 8},
    "least": {"max_model_len": 2, "block_size": 1, "max_num_seqs": 1, "max_num_batched_tokens": 1},
    "few blocks": {"kv_cache_memory": 1 << 16, "max_num_seqs": 40},
}


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> LaunchRecord:
    monkeypatch.setattr(build, "compiles_at_launch", lambda model, device: True)
    return record_launches(monkeypatch)


def write_model(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SHAPES, name, MODELS[name])
    write_random_llama(folder, name, torch.device("cpu"))
    return str(folder)


def config_of(model: str, dtype: str = "bfloat16", **sizes: int) -> EngineConfig:
    given = {"kv_cache_memory": 8 << 20, "swap_space": 1 << 20, **sizes}
    return EngineConfig(model, kernels="triton", device="cpu", dtype=dtype, threads=1, **given)


def serve_in_every_way(config: EngineConfig, record: LaunchRecord, rounds: int) -> dict[str, set[str]]:
    """What was met in serving and not before, by kernel."""
    executor, _ = build_executor(config)
    before = record.copy()
    ServingMix(EngineCore(executor), seed=1).run(rounds)
    executor.close()
    return record.beyond(before)


@pytest.mark.parametrize("name", MODELS)
def test_serving_meets_nothing_new(
    name: str, tmp_path: Path, record: LaunchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model", name, monkeypatch)
    config = config_of(model, "bfloat16" if name == "usual sizes" else "float32", max_num_seqs=40)
    assert serve_in_every_way(config, record, 25) == {}


@pytest.mark.parametrize("name", CAPACITIES)
def test_nor_with_other_capacities(
    name: str, tmp_path: Path, record: LaunchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where less fits, less can be met; but not nothing."""
    model = write_model(tmp_path / "model", "odd vocabulary, groups of 3", monkeypatch)
    assert serve_in_every_way(config_of(model, "float32", **CAPACITIES[name]), record, 6) == {}


def test_nor_with_kv_of_8_bits(tmp_path: Path, record: LaunchRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(write_model(tmp_path / "model", "usual sizes", monkeypatch), max_num_seqs=40)
    assert serve_in_every_way(replace(config, kv_cache_dtype="fp8"), record, 10) == {}


def test_how_many_variants_are_compiled(
    tmp_path: Path, record: LaunchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the documentation has it: each takes time at the first start on a machine."""
    config = config_of(write_model(tmp_path / "model", "usual sizes", monkeypatch), max_num_seqs=40)
    build_executor(config)[0].close()
    assert record.count == 40


def test_a_new_variant_is_noticed(
    tmp_path: Path, record: LaunchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the steps that look for them, serving meets variants."""
    monkeypatch.setattr(build, "launch_all_variants", lambda executor: None)
    config = config_of(write_model(tmp_path / "model", "usual sizes", monkeypatch), max_num_seqs=40)
    new = serve_in_every_way(config, record, 10)
    assert {"_prefill_attention", "_sample", "_penalise", "_block_summaries"} <= set(new)


def test_interpreted_kernels_need_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_launches(monkeypatch)
    config = config_of(write_model(tmp_path / "model", "usual sizes", monkeypatch))
    executor, _ = build_executor(config)
    before = record.count
    launch_all_variants(executor)
    assert record.count > before
    executor.close()
