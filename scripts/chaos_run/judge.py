"""Whether a greedy output is one that the model gives: its logits, computed by another implementation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .workload import Asked

TIE = 1e-3
"""Logits that lie as near are equal: which one is larger depends on the order of a sum."""


class LogitJudge:
    """Hugging Face's model in float32 with eager attention, without a KV cache."""

    def __init__(self, directory: Path) -> None:
        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._known: dict[tuple[int, tuple[int, ...]], list[float]] = {}
        self.widest = 0.0
        """The most by which a token's logit was found below the best one."""

    def shortfalls(self, asked: Asked, tokens: Sequence[int]) -> list[float]:
        """By how much each token's logit is below the best one, given the tokens before it."""
        key = (asked.number, tuple(tokens))
        if key not in self._known:
            ids = torch.tensor([[*asked.prompt_ids, *tokens]])
            with torch.inference_mode():
                logits = self._model(input_ids=ids, use_cache=False).logits[0, len(asked.prompt_ids) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            self._known[key] = (logits.max(dim=1).values - chosen).tolist()
            self.widest = max(self.widest, *self._known[key])
        return self._known[key]

    def ties(
        self, outputs: Sequence[Sequence[int]], asked: Asked, tokens: Sequence[int], position: int
    ) -> int | None:
        """outputs: those expected, by request. Positions at which these tokens and the best, or the
        expected, ones are as good as each other; None where they are not. Up to `position` they are
        the expected ones."""
        shortfalls = self.shortfalls(asked, tokens)
        there = self.shortfalls(asked, outputs[asked.number])[position]
        if max(*shortfalls, there) > TIE:
            return None
        return 1 + sum(shortfall > 0.0 for shortfall in shortfalls[position + 1 :])
