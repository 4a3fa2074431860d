"""`LLM`: a model loaded into this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from chiron_engine.config import EngineConfig
from chiron_engine.gateway.text import ModelText

from .core_setup import load_core
from .offline import OfflineEngine


class LLM(OfflineEngine):
    """Load a model and generate with it.

        with LLM("smollm2", dtype="float32") as llm:
            (output,) = llm.generate("The capital of France is", SamplingParams(temperature=0.0))
            print(output.text)

    model: a Hugging Face directory or id, a .gguf file, or `smollm2`; or a whole EngineConfig. options:
    fields of EngineConfig; limits are fixed unless `local_autoscaler` says otherwise.
    progress(phase, fraction): called while the model loads.

    Raises ModelError where the model cannot be loaded, MemoryError where it does not fit,
    ValueError for an option outside its range.
    """

    def __init__(
        self,
        model: str | EngineConfig,
        *,
        progress: Callable[[str, float], None] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, EngineConfig):
            config = dataclasses.replace(model, **options)
        else:
            # Offline nobody waits for the next token: as many at once as fit.
            config = EngineConfig(model=model, **{"local_autoscaler": "fixed", **options})
        with ExitStack() as resources:
            loaded = load_core(config, resources, progress)
            assert loaded.path is not None  # a model comes from a directory
            text = ModelText.from_directory(loaded.path)
            kept = resources.pop_all()
        super().__init__(loaded.core, config, text, loaded.eos_token_ids, kept, loaded.compile_guide)
