"""Capacities that Triton's kernels do not take, refused before the first step asks them to."""

from __future__ import annotations

from chiron_engine.config import EngineConfig
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.spec import ModelSpec


def check_capacities(config: EngineConfig, kernels: Kernels) -> None:
    """Raises ValueError, which names the setting, its value and the limit."""
    if kernels is not Kernels.TRITON:
        return
    from chiron_kernels.gpu.step_limits import MOST_DECODES, MOST_KEYS, MOST_TOKENS

    limits = {
        "max_num_seqs": MOST_DECODES,
        "max_num_batched_tokens": MOST_TOKENS,
        "max_model_len": MOST_KEYS,
    }
    for name, most in limits.items():
        given = getattr(config, name)
        if given is not None and given > most:
            raise ValueError(f"{name} is {given:,}; with Triton's kernels it must be at most {most:,}")


def check_model(spec: ModelSpec, kernels: Kernels) -> None:
    """Raises ValueError for a vocabulary that they cannot sample from."""
    if kernels is not Kernels.TRITON:
        return
    from chiron_kernels.gpu.step_limits import LARGEST_VOCABULARY

    if spec.vocab_size > LARGEST_VOCABULARY:
        raise ValueError(
            f"{spec.name} has a vocabulary of {spec.vocab_size:,} tokens; Triton's kernels take at most "
            f"{LARGEST_VOCABULARY:,}: take kernels torch"
        )
