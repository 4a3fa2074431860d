"""Once an engine serves, Triton compiles nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serving_mix import ServingMix

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.runtime.build import build_executor
from scripts.gpu_suite.random_llama import SHAPES, write_random_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("vocab", [512, 258])
def test_serving_compiles_nothing(vocab: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled: list[str] = []

    def note(**given: Any) -> None:
        compiled.append(given["repr"])

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    shape = SHAPES["tiny"] | {"max_position_embeddings": 2048, "vocab_size": vocab}
    monkeypatch.setitem(SHAPES, "served", shape)
    write_random_llama(tmp_path, "served", torch.device("cuda"))
    executor, _ = build_executor(
        EngineConfig(str(tmp_path), kernels="triton", device="cuda", kv_cache_memory=8 << 20, max_num_seqs=40)
    )
    # Kernels that an engine before this one had compiled in this process are not compiled again.
    compiled.clear()
    ServingMix(EngineCore(executor), seed=1).run(40)
    assert compiled == []
    executor.close()
