"""One model type: whether the engine serves it exactly, refuses it, or fails."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from chiron_engine.model.errors import ModelError, UncheckedModel
from chiron_engine.model.hugging_face import HuggingFaceModel, check_supported
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.llama_config import ARCHITECTURES
from chiron_engine.model.loader import CausalLM, load_model
from chiron_engine.model.precision import FLOAT32
from scripts.family_sweep.exactness import difference
from scripts.family_sweep.tiny_configs import default_fields, narrow_config, tiny_config

PASSED, REFUSED, FAILED = "passed", "refused", "failed"
_CPU = torch.device("cpu")
# Options that a checkpoint of a type may set, and that must then be served right or refused too.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {"use_sliding_window": True, "sliding_window": 6, "layer_types": None},
    {"use_sliding_window": True, "sliding_window": 6},
    {"sliding_window": 6},
    {"num_kv_shared_layers": 2},
    {"is_decoder": False},
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """result: passed, refused or failed. reason: the engine's refusal, or what went wrong; for a
    type that passed, what of it is refused."""

    kind: str
    architecture: str
    result: str
    reason: str = ""


def check_type(kind: str, architecture: str) -> Outcome:
    """The outcome of model type `kind`, whose class is `architecture`."""
    result, reason = _check(kind, {})
    if result != PASSED:
        return Outcome(kind, architecture, result, reason)
    notes = []
    for options in _variants(kind):
        result, reason = _check(kind, options)
        named = ", ".join(f"{name}={value}" for name, value in options.items())
        if result == FAILED:
            return Outcome(kind, architecture, FAILED, f"with {named}: {reason}")
        if result == REFUSED:
            notes.append(f"with {named} refused: {reason}")
    return Outcome(kind, architecture, PASSED, "; ".join(notes))


def _variants(kind: str) -> list[dict[str, Any]]:
    """The options that configurations of this type have and do not set by themselves."""
    known = default_fields(kind)
    has_window = known.get("sliding_window") is not None
    return [
        options
        for options in _VARIANTS
        if options.keys() <= known.keys() and not (has_window and "sliding_window" in options)
    ]


def _check(kind: str, options: dict[str, Any]) -> tuple[str, str]:
    try:
        narrow, tiny = narrow_config(kind, **options), tiny_config(kind, **options)
    except Exception as error:  # whatever a configuration raises
        return FAILED, f"its tiny configuration is not valid: {_first_line(error)}"
    try:
        check_supported(narrow)
    except UncheckedModel as error:
        return FAILED, str(error)
    except ModelError as error:
        return REFUSED, str(error)
    with tempfile.TemporaryDirectory() as folder:
        return _check_saved(tiny, Path(folder))


def _check_saved(config: Any, folder: Path) -> tuple[str, str]:
    try:
        eager = _save_random(config, folder)
        for model in _loaded(folder, config):
            unlike = difference(model, eager)
            if unlike is not None:
                return FAILED, f"{type(model).__name__}: {unlike}"
    except UncheckedModel as error:
        return FAILED, str(error)
    except ModelError as error:
        return FAILED, f"accepted as it usually is, but not with few layers and short windows: {error}"
    except Exception as error:  # whatever a model class raises
        return FAILED, f"{type(error).__name__}: {_first_line(error)}"
    return PASSED, ""


def _save_random(config: Any, folder: Path) -> Any:
    """The model of `config` with everything trainable random, saved to `folder`; for eager reference."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at one and biases at zero, which would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model


def _loaded(folder: Path, config: Any) -> list[CausalLM]:
    """The model as the engine loads it; a native one also through its class."""
    model = load_model(folder, precision=FLOAT32, device=_CPU)
    if model.spec.architecture not in ARCHITECTURES or isinstance(model, HuggingFaceModel):
        return [model]
    return [model, HuggingFaceModel(folder, precision=FLOAT32, device=_CPU, kernels=Kernels.TORCH)]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
