"""Models run through their Hugging Face class compile no kernel once they serve, either: their heads lie as
their own code has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.loader import load_model
from chiron_engine.model.precision import FLOAT32
from chiron_engine.runtime import build
from tests.model.tiny_config import TINY
from tests.runtime.serving_mix import ServingMix
from tests.specialisations import record_launches

LONG = TINY | {"max_position_embeddings": 2048, "head_dim": 16, "num_hidden_layers": 2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu counts what is compiled")
def test_serving_meets_nothing_new(
    save_tiny: Callable[[Any], tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of layers with a window, too short to be split, and of layers without, with shared prefixes too."""
    from transformers import Gemma2Config

    monkeypatch.setenv("CHIRON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "compiles_at_launch", lambda model, device: True)
    config = Gemma2Config(**LONG, sliding_window=900, query_pre_attn_scalar=16, attn_logit_softcapping=2.0)
    _, path = save_tiny(config)
    # Checked by numbers, which launches that are only recorded do not give.
    load_model(path, precision=FLOAT32, device=torch.device("cpu"), kernels=Kernels.TORCH)
    record = record_launches(monkeypatch)
    executor, _ = build.build_executor(
        EngineConfig(
            str(path),
            kernels="triton",
            device="cpu",
            dtype="float32",
            kv_cache_memory=8 << 20,
            max_num_seqs=40,
            threads=1,
        )
    )
    before = record.copy()
    ServingMix(EngineCore(executor), seed=1).run(8)
    executor.close()
    assert record.beyond(before) == {}
    assert (len(before["_decode_attention"]), len(before["_prefill_attention"])) == (3, 18)
