"""How likely the model had the tokens of prompts: rows of chunks whose logits are wanted beside those of the
sampled rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chiron_engine.model.attention import ChunkRows
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.policy.iteration.plan import StepPlan, TokenLogprobs

from .slots import SlotStates
from .token_logprobs import LogprobRows, Logprobs, ranked_logprobs_of
from .uploads import upload_array


@dataclass(slots=True)
class PromptRows:
    """rows: int64 [N], of the forward pass. targets: int64 [N], the token after each. counts: how many of the
    likeliest tokens each wants. chunks: number of each chunk that has some, and how many."""

    rows: Tensor
    targets: Tensor
    counts: list[int]
    chunks: list[tuple[int, int]]

    def scores(self, logits: Tensor, kernels: Kernels | None = None) -> PromptScores:
        """logits: float32 [N, vocab]. kernels: None is the best for the device."""
        every = range(len(self.counts))
        of = LogprobRows(list(every), torch.arange(len(every), device=logits.device), self.counts)
        found, ranks = ranked_logprobs_of(logits, self.targets, of, kernels)
        return PromptScores(found, ranks, self.chunks)


@dataclass(slots=True)
class PromptScores:
    found: Logprobs
    ranks: Tensor
    chunks: list[tuple[int, int]]

    def to_host(self) -> PromptScores:
        """Copies under way to pinned memory; complete with the step."""
        ranks = torch.empty(self.ranks.shape, dtype=self.ranks.dtype, pin_memory=True)
        ranks.copy_(self.ranks, non_blocking=True)
        return PromptScores(self.found.to_host(), ranks, self.chunks)

    def by_chunk(self) -> dict[int, list[TokenLogprobs]]:
        every = list(self.found.by_row().values())
        for one, rank in zip(every, self.ranks.tolist(), strict=True):
            one.rank = rank
        told, place = {}, 0
        for number, count in self.chunks:
            told[number] = every[place : place + count]
            place += count
        return told


def prompt_rows(plan: StepPlan, chunk_rows: Sequence[ChunkRows], states: SlotStates) -> PromptRows | None:
    """Of the chunks of a plan, which begin at these rows of the pass; None where nobody asks."""
    rows, targets, counts, chunks = [], [], [], []
    for number, (chunk, at) in enumerate(zip(plan.chunks, chunk_rows, strict=True)):
        size = chunk.score_to - chunk.score_from
        if not size:
            continue
        rows.append(at.row_start + np.arange(chunk.score_from, chunk.score_to) - chunk.start)
        targets.append(states.known_tokens(chunk.slot, chunk.score_from + 1, size))
        counts += [plan.chunk_requests[number].sampling.prompt_logprobs or 0] * size
        chunks.append((number, size))
    if not chunks:
        return None
    of_rows, of_targets = upload_array(
        np.stack((np.concatenate(rows), np.concatenate(targets))), states.device
    )
    return PromptRows(of_rows, of_targets, counts, chunks)
