"""Models for the tests of this folder: SmolLM2 once per run, and tiny ones with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chiron_engine.model.errors import ModelError
from chiron_engine.model.source import resolve_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of the converted model, made at most once on a machine."""
    try:
        return resolve_model("smollm2")
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[[Any], tuple[Any, Path]]:
    """Builds a configuration's model with random weights, everything trainable made random, and
    saves it with a tokenizer. Returns the model, for eager reference, and its directory."""

    def save(config: Any) -> tuple[Any, Path]:
        from tokenizers import Tokenizer, models
        from transformers import AutoModelForCausalLM

        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # norms start at one and biases at zero, which would hide a mistake
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                assert parameter.isfinite().all(), name
        path = tmp_path / config.model_type
        model.save_pretrained(path)
        Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(path / "tokenizer.json"))
        return model, path

    return save
