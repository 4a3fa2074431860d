"""Chiron: an LLM serving engine that scales itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chiron_engine.policy.iteration.sampling_params import SamplingParams as SamplingParams
    from chiron_engine.serving.llm import LLM as LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing chiron_engine.policy loads no torch.
    if name == "LLM":
        from chiron_engine.serving.llm import LLM

        return LLM
    if name == "SamplingParams":
        from chiron_engine.policy.iteration.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
