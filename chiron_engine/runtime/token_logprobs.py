"""How likely the model had the tokens that were chosen, and which were likelier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from chiron_kernels.cpu import sampling as compiled
from torch import Tensor

from chiron_engine.model.cpu_kernels import kernels_for
from chiron_engine.policy.iteration.plan import TokenLogprobs

from .uploads import IntArray, upload_array

ROWS_AT_ONCE = 32
"""Of logits that are copied."""


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


def logprobs_of(logits: Tensor, tokens: Tensor, of: LogprobRows) -> Logprobs:
    """logits: [rows, vocab] float32, as the model gave them. tokens: int64 [rows], those chosen."""
    most = min(max(of.counts), logits.shape[1])
    kernels = kernels_for(logits.device)
    if kernels is not None:
        return Logprobs(of, *compiled.token_logprobs(kernels, logits, of.rows, tokens, most))
    return Logprobs(of, *_logprobs_with_torch(logits, tokens, of.rows, most))


def _logprobs_with_torch(
    logits: Tensor, tokens: Tensor, of_rows: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the chosen tokens [N], and ids and those of the `most` likeliest [N, most]."""
    chosen, ids, top = [], [], []
    for rows in of_rows.split(ROWS_AT_ONCE):
        some = logits.index_select(0, rows)
        total = torch.logsumexp(some, dim=-1, keepdim=True)
        chosen.append((some.gather(1, tokens[rows].unsqueeze(1)) - total).squeeze(1))
        best, places = some.topk(most, dim=-1)
        ids.append(places)
        top.append(best - total)
    return torch.cat(chosen), torch.cat(ids), torch.cat(top)


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
