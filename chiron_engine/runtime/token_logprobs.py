"""How likely the model had the tokens that were chosen, and which were likelier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from chiron_kernels.cpu import sampling as compiled
from chiron_kernels.reference import logprobs as reference
from torch import Tensor

from chiron_engine.model.kernel_choice import Kernels, best_kernels, library_of
from chiron_engine.policy.iteration.plan import TokenLogprobs

from .uploads import IntArray, upload_array

RANKED_AT_ONCE = 16
"""Rows of logits that are compared."""


@dataclass(slots=True)
class LogprobRows:
    """The rows of a batch that ask. counts: how many of the likeliest tokens each wants; rows: on the
    device, as in `rows_on_host`."""

    rows_on_host: list[int]
    rows: Tensor
    counts: list[int]


@dataclass(slots=True)
class Logprobs:
    """Of the rows that ask, [N], with the K likeliest tokens, [N, K]."""

    of: LogprobRows
    chosen: Tensor
    top_ids: Tensor
    top: Tensor

    def to_host(self) -> Logprobs:
        """Copies under way to pinned memory; complete with the step."""
        return Logprobs(self.of, *(_pinned(each) for each in (self.chosen, self.top_ids, self.top)))

    def by_row(self) -> dict[int, TokenLogprobs]:
        chosen, ids, top = self.chosen.tolist(), self.top_ids.tolist(), self.top.tolist()
        return {
            row: TokenLogprobs(chosen[place], ids[place][:count], top[place][:count])
            for place, (row, count) in enumerate(zip(self.of.rows_on_host, self.of.counts, strict=True))
        }


class LogprobTable:
    """Which slots ask, and for how many."""

    def __init__(self, max_slots: int, device: torch.device) -> None:
        self._counts = np.full(max_slots, -1, np.int64)
        self._device = device

    def set(self, slot: int, count: int | None) -> None:
        self._counts[slot] = -1 if count is None else count

    def rows(self, slots: IntArray) -> LogprobRows | None:
        counts = self._counts[slots]
        rows = np.flatnonzero(counts >= 0)
        if not rows.size:
            return None
        return LogprobRows(rows.tolist(), upload_array(rows, self._device), counts[rows].tolist())


def logprobs_of(logits: Tensor, tokens: Tensor, of: LogprobRows, kernels: Kernels | None = None) -> Logprobs:
    """logits: [rows, vocab] float32, as the model gave them. tokens: int64 [rows], those chosen. kernels:
    None is the best for the device."""
    kernels = kernels or best_kernels(logits.device)
    if kernels is Kernels.TRITON:
        return ranked_logprobs_of(logits, tokens, of, kernels)[0]
    most = _largest_count(logits, of)
    library = library_of(kernels, logits.device)
    if library is not None:
        return Logprobs(of, *compiled.token_logprobs(library, logits, of.rows, tokens, most))
    chosen, ids, top, _ = reference.token_logprobs(logits, of.rows, tokens, most)
    return Logprobs(of, chosen, ids, top)


def ranked_logprobs_of(
    logits: Tensor, tokens: Tensor, of: LogprobRows, kernels: Kernels | None = None
) -> tuple[Logprobs, Tensor]:
    """The same, and the ranks of the tokens, int64 [N], 1 for the likeliest of a row."""
    kernels = kernels or best_kernels(logits.device)
    if kernels is not Kernels.TRITON:
        parts = of.rows.split(RANKED_AT_ONCE)
        ranks = [reference.ranks_of(logits.index_select(0, rows), tokens[rows]) for rows in parts]
        return logprobs_of(logits, tokens, of, kernels), torch.cat(ranks)
    from chiron_kernels.gpu.logprobs import token_logprobs

    chosen, ids, top, found = token_logprobs(logits, of.rows, tokens, _largest_count(logits, of))
    return Logprobs(of, chosen, ids, top), found


def _largest_count(logits: Tensor, of: LogprobRows) -> int:
    return min(max(of.counts), logits.shape[1])


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
