"""Rotary position embeddings: the frequencies of each published scaling, and their application."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from chiron_engine.model.errors import ModelError

Angles = tuple[torch.Tensor, torch.Tensor]
"""cos and signed sin of the rows' positions, [T, 1, head_dim] each."""


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """parameters: what config.json gives for the scaling, with `rope_type`."""

    head_dim: int
    theta: float
    rope_type: str
    parameters: dict[str, Any]
    max_position: int

    def number(self, name: str, default: float | None = None) -> float:
        value = self.parameters.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"config.json: rope type {self.rope_type} needs {name} > 0, not {value!r}")
        return float(value)


def inverse_frequencies(rope: RopeSettings) -> tuple[torch.Tensor, float]:
    """float32 [head_dim / 2] radians per position, and the factor of cos and sin.

    Raises ModelError for a rope type that is not implemented."""
    scale = _SCALINGS.get(rope.rope_type)
    if scale is None:
        raise ModelError(f"config.json: rope type {rope.rope_type!r} is not one of {', '.join(_SCALINGS)}")
    exponent = torch.arange(0, rope.head_dim, 2, dtype=torch.float32) / rope.head_dim
    return scale(1.0 / rope.theta**exponent, rope)


def _unscaled(frequencies: torch.Tensor, rope: RopeSettings) -> tuple[torch.Tensor, float]:
    return frequencies, 1.0


def _linear(frequencies: torch.Tensor, rope: RopeSettings) -> tuple[torch.Tensor, float]:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    return frequencies / rope.number("factor"), 1.0


def _llama3(frequencies: torch.Tensor, rope: RopeSettings) -> tuple[torch.Tensor, float]:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, those between blended."""
    factor, low, high = (rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rope.number("original_max_position_embeddings", rope.max_position) * frequencies / (2 * math.pi)
    if high <= low:
        raise ModelError(f"config.json: high_freq_factor {high} must exceed low_freq_factor {low}")
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies, 1.0


def _yarn(frequencies: torch.Tensor, rope: RopeSettings) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), with DeepSeek's mscale."""
    original = rope.number("original_max_position_embeddings", rope.max_position)
    factor = rope.number("factor", rope.max_position / original)

    def dimension_of(turns: float) -> float:
        """Where along the head the wave makes `turns` turns within the original context."""
        return rope.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension_of(rope.number("beta_fast", 32))
    high = dimension_of(rope.number("beta_slow", 1))
    if rope.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    position = torch.arange(rope.head_dim // 2, dtype=torch.float32)
    interpolated = ((position - low) / (max(high - low, 0.001))).clamp(0, 1)
    scaled = interpolated * frequencies / factor + (1 - interpolated) * frequencies
    return scaled, _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: RopeSettings, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = rope.parameters.get("attention_factor")
    if given is not None:
        return rope.number("attention_factor")
    if rope.parameters.get("mscale") and rope.parameters.get("mscale_all_dim"):
        return mscale(rope.number("mscale")) / mscale(rope.number("mscale_all_dim"))
    return mscale(1.0)


_Scaling = Callable[[torch.Tensor, RopeSettings], tuple[torch.Tensor, float]]
_SCALINGS: dict[str, _Scaling] = {
    "default": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


class Rope:
    """Rotates queries and keys by their position."""

    def __init__(self, rope: RopeSettings, dtype: torch.dtype, device: torch.device) -> None:
        frequencies, self._factor = inverse_frequencies(rope)
        self._frequencies = frequencies.to(device)
        self._dtype = dtype

    def angles(self, positions: torch.Tensor) -> Angles:
        """cos and signed sin, each [T, 1, head_dim], for int64 positions [T]; shared by all layers."""
        angle = positions[:, None, None].float() * self._frequencies
        cos, sin = angle.cos() * self._factor, angle.sin() * self._factor
        return torch.cat((cos, cos), -1).to(self._dtype), torch.cat((-sin, sin), -1).to(self._dtype)


def rotate(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """x [T, H, D], element i paired with i + D / 2: x cos + (other half) (signed sin)."""
    cos, sin = angles
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
