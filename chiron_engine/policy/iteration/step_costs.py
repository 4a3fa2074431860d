"""Seconds of a step as a linear function of what is in it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepCosts:
    """t = base + per_request n + per_kv_token K + per_prompt_token P + per_prompt_context C, with n
    decoding requests, K the sum of their KV lengths, P prompt tokens and C the sum over prompt
    chunks of count x KV length at the chunk's end. All in seconds, none negative."""

    base_s: float
    per_request_s: float = 0.0
    per_kv_token_s: float = 0.0
    per_prompt_token_s: float = 0.0
    per_prompt_context_s: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be finite and not negative")

    def seconds(
        self, requests: float, kv_tokens: float, prompt_tokens: float = 0.0, prompt_context: float = 0.0
    ) -> float:
        return (
            self.base_s
            + self.per_request_s * requests
            + self.per_kv_token_s * kv_tokens
            + self.per_prompt_token_s * prompt_tokens
            + self.per_prompt_context_s * prompt_context
        )

    def prefill_s(self, tokens: float, start: float = 0.0) -> float:
        """Marginal seconds of computing known tokens [start, start + tokens) of one request in one
        chunk, inside steps that run anyway."""
        return self.per_prompt_token_s * tokens + self.per_prompt_context_s * tokens * (start + tokens)

    def scaled(self, factor: float) -> StepCosts:
        """Steps that take `factor` times as long."""
        return StepCosts(*(factor * getattr(self, name) for name in self.__slots__))
