"""Any other causal language model: its Hugging Face class unmodified, on packed rows, with our
attention in place of its own. The only module that runs Hugging Face's modelling code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from chiron_kernels.gpu.paged_kv import EIGHT_BITS
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from chiron_engine.model import hugging_face_attention
from chiron_engine.model.attention import AttentionBackend, AttentionBatch
from chiron_engine.model.checkpoint import Checkpoint
from chiron_engine.model.directory import CONFIG, eos_token_ids, model_name, read_json
from chiron_engine.model.errors import ModelError
from chiron_engine.model.hugging_face_attention import FORWARD, LayerAttention, PagedForward, Probe
from chiron_engine.model.hugging_face_config import context_length, layer_windows, refuse_unsupported
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.kv_cache_dtype import check_kv_heads
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.kv_scales import read_kv_scales
from chiron_engine.model.parts import backend_for
from chiron_engine.model.precision import Precision
from chiron_engine.model.spec import ModelSpec

# How RoBERTa and its kin make positions of tokens: they begin after the id of padding.
_FROM_PADDING = "create_position_ids_from_input_ids"


class PackedModel:
    """A Hugging Face model in memory, run on packed rows. Raises ModelError where its attention
    needs what is not implemented."""

    def __init__(self, model: Any, attention: AttentionBackend) -> None:
        self._model = model.eval()
        self._attention = attention
        parameters = inspect.signature(type(model).forward).parameters
        if "position_ids" not in parameters:
            raise ModelError(f"{type(model).__name__} takes no position_ids: rows cannot be packed")
        if any(hasattr(module, _FROM_PADDING) for module in model.modules()):
            raise ModelError(f"{type(model).__name__} numbers positions from its padding id: not supported")
        self._keeps_logits = "logits_to_keep" in parameters
        self.layers = self._probe()
        self.windows = self._agreed_windows(layer_windows(model.config))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        pool: KvPool,
        sample_rows: torch.Tensor,
    ) -> torch.Tensor:
        """As `CausalLM.forward`."""
        self._attention.begin(batch, pool)
        kept = {"logits_to_keep": sample_rows} if self._keeps_logits else {}
        token = FORWARD.set(PagedForward(self._attention, batch, pool, self.windows))
        try:
            logits = self._call(input_ids, positions, **kept)
        finally:
            FORWARD.reset(token)
        return (logits if self._keeps_logits else logits[sample_rows]).float()

    def _call(self, input_ids: torch.Tensor, positions: torch.Tensor, **kept: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=input_ids[None], position_ids=positions[None], use_cache=False, return_dict=True, **kept
        )
        return output.logits[0]

    def _probe(self) -> list[LayerAttention]:
        probe, device = Probe(), self._model.device
        token = FORWARD.set(probe)
        try:
            with torch.inference_mode():
                ids = torch.zeros(1, dtype=torch.int64, device=device)
                self._call(ids, torch.zeros_like(ids))
        finally:
            FORWARD.reset(token)
        count = self._model.config.num_hidden_layers
        if sorted(probe.layers) != list(range(count)):
            raise ModelError(
                f"{type(self._model).__name__} has {count} layers, of which {len(probe.layers)} use "
                "attention: recurrent or hybrid models are not supported"
            )
        return [probe.layers[index] for index in range(count)]

    def _agreed_windows(self, configured: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The configuration's windows. Modules may leave the window to the mask, so that one not
        asked for still holds; one asked for that the configuration does not have is refused."""
        for index, (layer, window) in enumerate(zip(self.layers, configured, strict=True)):
            if layer.window is not None and layer.window != window:
                raise ModelError(
                    f"{type(self._model).__name__} layer {index} has a window of {layer.window}, but its "
                    f"configuration says {window}: not supported"
                )
        return configured


class HuggingFaceModel:
    """A causal language model loaded from a directory through transformers."""

    def __init__(
        self,
        path: Path,
        *,
        precision: Precision,
        device: torch.device,
        kernels: Kernels,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        report = progress or (lambda phase, fraction: None)
        raw = read_json(path / CONFIG)
        config = _read_config(path, raw)
        report("self-check", 0.0)
        architecture = check_supported(config)
        report("load weights", 0.0)
        scales = None
        if precision.kv == EIGHT_BITS:
            scales = read_kv_scales(Checkpoint(path, precision.compute, device))
        loaded = _load(path, precision.compute, device)
        packed = PackedModel(loaded, backend_for(kernels, device, scales))
        report("load weights", 1.0)
        self.precision, self.kernels = precision, kernels
        self.capturable = False  # what a family's own code launches is not known
        self._packed = packed
        self.spec = ModelSpec(
            name=model_name(path),
            architecture=architecture,
            layers=tuple(layer.geometry for layer in packed.layers),
            vocab_size=config.vocab_size,
            max_model_len=context_length(config),
            eos_token_ids=eos_token_ids(path, raw),
            path=path,
            windows=packed.windows,
        )
        check_kv_heads(self.spec.layers, precision)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        pool: KvPool,
        sample_rows: torch.Tensor,
    ) -> torch.Tensor:
        """As `CausalLM.forward`."""
        return self._packed.forward(input_ids, positions, batch, pool, sample_rows)


def check_supported(config: Any) -> str:
    """The class of `config`, once it is known to be served right. Raises ModelError, naming the
    reason, where it is not."""
    from chiron_engine.model.self_check import check_architecture

    refuse_unsupported(config)
    architecture: str = _supported_class(config).__name__
    layer_windows(config)
    context_length(config)
    check_architecture(config)
    return architecture


def _read_config(path: Path, raw: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        if raw.get("auto_map"):
            raise ModelError(
                f"{path} brings its own code (auto_map), which is never run, and its model_type "
                f"{raw.get('model_type')!r} is not one transformers knows"
            ) from None
        raise ModelError(f"{path / CONFIG}: {_first_line(error)}") from None


def _supported_class(config: Any) -> Any:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{config.model_type} is not a causal language model transformers knows")
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    found = found[0] if isinstance(found, tuple) else found
    if found._is_stateful:
        raise ModelError(f"{found.__name__} keeps recurrent state, which is not supported")
    if not found._supports_attention_backend:
        raise ModelError(f"{found.__name__} does not let its attention be replaced: not supported")
    return found


def _load(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, loading = from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=hugging_face_attention.NAME,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as error:  # transformers raises whatever its layers raise
        raise ModelError(f"cannot load {path}: {_first_line(error)}") from error
    for what in ("missing_keys", "mismatched_keys"):
        if loading.get(what):
            name = str(sorted(loading[what], key=str)[0])
            raise ModelError(f"{path}: {what.split('_')[0]} tensor {name}: not a checkpoint of this model")
    return model.to(device)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
