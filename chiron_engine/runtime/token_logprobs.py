"""How likely the model had the tokens that were chosen, and which were likelier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chiron_engine.policy.iteration.plan import TokenLogprobs

from .row_maxima import largest_few
from .uploads import IntArray, upload_array

ROWS_AT_ONCE = 4
"""Of logits that are copied on the CPU: few enough for its cache."""
ROWS_AT_ONCE_ON_GPU = 32


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
    most, chosen, ids, top = max(of.counts), [], [], []
    at_once = ROWS_AT_ONCE if logits.device.type == "cpu" else ROWS_AT_ONCE_ON_GPU
    for rows in of.rows.split(at_once):
        some = logits.index_select(0, rows)
        total = torch.logsumexp(some, dim=-1, keepdim=True)
        chosen.append((some.gather(1, tokens[rows].unsqueeze(1)) - total).squeeze(1))
        best, places = largest_few(some, min(most, some.shape[1]))
        ids.append(places)
        top.append(best - total)
    return Logprobs(of, torch.cat(chosen), torch.cat(ids), torch.cat(top))


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
