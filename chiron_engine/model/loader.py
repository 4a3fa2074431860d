"""From a model directory to a model that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from chiron_kernels.cpu.paged_attention import LARGEST_HEAD

from chiron_engine.model.attention import AttentionBatch
from chiron_engine.model.cpu_kernels import why_not_int8
from chiron_engine.model.directory import CONFIG, check_directory, read_json
from chiron_engine.model.errors import ModelError
from chiron_engine.model.kernel_choice import Kernels, best_kernels
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.llama_config import ARCHITECTURES, architecture_of, parse_config
from chiron_engine.model.precision import BFLOAT16, FLOAT32, INT8, Precision
from chiron_engine.model.spec import ModelSpec


class CausalLM(Protocol):
    """A decoder over packed rows and paged KV.

    capturable: over rows that only decode, what `forward` launches depends on how many there are, and on
    nothing that only the device knows or that changes from step to step, so that a CUDA graph of it serves
    all steps of that size; and a row of length 0 is padding (see `runtime.decode_graphs`).
    """

    spec: ModelSpec
    precision: Precision
    kernels: Kernels
    capturable: bool

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        pool: KvPool,
        sample_rows: torch.Tensor,
    ) -> torch.Tensor:
        """Logits float32 [S, vocab_size] of the rows sample_rows (int64 [S]) out of the T rows of
        input_ids and positions (int64 [T]). Call it under torch.inference_mode."""
        ...


def load_model(
    path: Path,
    *,
    precision: Precision,
    device: torch.device,
    kernels: Kernels | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> CausalLM:
    """Load the model in directory `path`. kernels: None takes the best for the device. Raises ModelError
    where the model is broken or not supported, also in this precision."""
    check_directory(path)
    if precision.int8_weights and (reason := why_not_int8_model(path)) is not None:
        raise ModelError(f"{reason}; take float32 or bfloat16")
    kernels = kernels or best_kernels(device)
    if is_native(path):
        from chiron_engine.model.native import LlamaModel

        return LlamaModel(path, precision=precision, device=device, kernels=kernels, progress=progress)
    from chiron_engine.model.hugging_face import HuggingFaceModel

    return HuggingFaceModel(path, precision=precision, device=device, kernels=kernels, progress=progress)


def is_native(path: Path) -> bool:
    """Whether the model in directory `path` runs without transformers."""
    return architecture_of(read_json(path / CONFIG)) in ARCHITECTURES


def why_not_int8_model(path: Path) -> str | None:
    """What keeps the model in directory `path` from int8; None where nothing does."""
    raw = read_json(path / CONFIG)
    if not is_native(path):
        return f"dtype int8 is for {', '.join(ARCHITECTURES)}, not for {architecture_of(raw)}"
    head_dim = parse_config(raw).head_dim
    if head_dim > LARGEST_HEAD or head_dim % 2:
        return f"dtype int8 is for heads of even size up to {LARGEST_HEAD}, not of {head_dim}"
    return None


def default_precision(path: Path, device: torch.device, kernels: Kernels | None = None) -> Precision:
    """What dtype `auto` means for the model in directory `path`: bfloat16 on a GPU; on the CPU int8 where
    it can run, which is the fastest and loses next to nothing (docs/cpu.md), else float32. bfloat16 is
    slower than float32 on a CPU without matrix tiles from some 32 rows on."""
    if device.type != "cpu":
        return BFLOAT16
    if (kernels or best_kernels(device)) is not Kernels.COMPILED or why_not_int8(device):
        return FLOAT32
    return FLOAT32 if why_not_int8_model(path) else INT8
