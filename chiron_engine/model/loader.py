"""From a model directory to a model that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from chiron_engine.model.attention import AttentionBatch, TorchAttention
from chiron_engine.model.directory import CONFIG, check_directory, read_json
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.llama_config import ARCHITECTURES, architecture_of
from chiron_engine.model.spec import ModelSpec


class CausalLM(Protocol):
    """A decoder over packed rows and paged KV."""

    spec: ModelSpec
    dtype: torch.dtype

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
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[str, float], None] | None = None,
) -> CausalLM:
    """Load the model in directory `path`. Raises ModelError where it is broken or not supported."""
    check_directory(path)
    if architecture_of(read_json(path / CONFIG)) in ARCHITECTURES:
        from chiron_engine.model.native import LlamaModel

        return LlamaModel(path, dtype=dtype, device=device, attention=TorchAttention(), progress=progress)
    from chiron_engine.model.hugging_face import HuggingFaceModel

    return HuggingFaceModel(path, dtype=dtype, device=device, attention=TorchAttention(), progress=progress)


def default_dtype(device: torch.device) -> torch.dtype:
    """What dtype `auto` means: float32 on the CPU, where it is also what repeats a resumed stream
    token for token, and bfloat16 elsewhere.

    Measured on 2 AVX-512 cores without matrix tiles (SmolLM2, ms of CPU time for one forward pass at
    1/8/32/64 decoding rows of context 160, then a 512-token prompt): float32 54/82/165/288, 947;
    bfloat16 37/66/172/326, 1,200. Above 32 rows and for prompts float32 wins.
    """
    return torch.float32 if device.type == "cpu" else torch.bfloat16
