"""What requests ask of their logits before a token is chosen: biases, end tokens that come too early,
penalties on tokens that were there before, in this order.

Every change of a row depends on that request alone, so its batch-mates do not matter. Nothing is read
back from the device: tokens that were sampled there are known there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chiron_engine.policy.iteration.request import Request

from .uploads import IntArray, upload_array


@dataclass(slots=True)
class _Adjusted:
    """One request that asks for something. Positions are indices in its sequence; `banned` ids are not
    drawn for those below `banned_until`. penalties: repetition, frequency, presence; None is none."""

    biased: IntArray
    biases: np.ndarray
    banned: IntArray
    banned_until: int
    penalties: tuple[float, float, float] | None
    output_from: int


@dataclass(slots=True)
class _Entries:
    """Single logits. rows, tokens: int64 [E]. values: [E], what to add (float32), or the position until
    which they are banned (int64)."""

    rows: Tensor
    tokens: Tensor
    values: Tensor


@dataclass(slots=True)
class _PenaltyRows:
    """P rows with penalties. rows, slots, output_from: int64 [P]. repetition, frequency, presence:
    float32 [P, 1]. decode_rows, decode_slots: those of them that decode."""

    rows: Tensor
    slots: Tensor
    output_from: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    decode_rows: Tensor
    decode_slots: Tensor


@dataclass(slots=True)
class LogitAdjustments:
    """For the rows of one batch, for as long as they are the same requests."""

    biases: _Entries | None
    bans: _Entries | None
    penalties: _PenaltyRows | None
    history: Tensor | None

    def apply(self, logits: Tensor, positions: Tensor, last_tokens: Tensor, longest: int) -> None:
        """Change `logits` [rows, vocab] float32 in place. positions: int64 [rows], the index in its
        sequence of the token to choose. last_tokens: int64 [slots], sampled last. longest: at least the
        largest position. To be called once for each token of a row, in order."""
        if self.biases is not None:
            at = (self.biases.rows, self.biases.tokens)
            logits.index_put_(at, self.biases.values, accumulate=True)
        if self.bans is not None:
            too_early = positions[self.bans.rows] < self.bans.values
            ban = torch.zeros_like(too_early, dtype=logits.dtype).masked_fill_(too_early, -torch.inf)
            logits.index_put_((self.bans.rows, self.bans.tokens), ban, accumulate=True)
        if self.penalties is not None and self.history is not None:
            note_sampled(self.history, self.penalties, positions, last_tokens)
            penalise(logits, self.history[:, :longest], self.penalties, positions)


class AdjustmentTable:
    """What the request in each slot asks for, and the tokens of those with penalties."""

    def __init__(self, max_slots: int, max_model_len: int, device: torch.device) -> None:
        self._adjusted: dict[int, _Adjusted] = {}
        self._shape = (max_slots, max_model_len)
        self._device = device
        self._history: Tensor | None = None
        """int32 [max_slots, max_model_len]; made when the first request needs it."""

    def set(self, slot: int, request: Request, tokens: IntArray) -> None:
        """tokens: all that it knows."""
        self._adjusted.pop(slot, None)
        sampling, prompt = request.sampling, len(request.prompt_ids)
        if not (sampling.logit_bias or sampling.min_tokens or sampling.has_penalties):
            return
        penalties = None
        if sampling.has_penalties:
            penalties = (
                sampling.repetition_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
            self._keep(slot, tokens)
        self._adjusted[slot] = _Adjusted(
            np.fromiter(sampling.logit_bias.keys(), np.int64),
            np.fromiter(sampling.logit_bias.values(), np.float32),
            np.array(sorted(request.stop_ids) if sampling.min_tokens else [], np.int64),
            prompt + sampling.min_tokens,
            penalties,
            prompt - request.num_prior_outputs,
        )

    def drop(self, slot: int) -> None:
        self._adjusted.pop(slot, None)

    def rows(self, slots: IntArray, num_decodes: int) -> LogitAdjustments | None:
        """For the given slots, in their order, of which the first `num_decodes` decode."""
        if not self._adjusted:
            return None
        found = [
            (row, slot, self._adjusted[slot])
            for row, slot in enumerate(slots.tolist())
            if slot in self._adjusted
        ]
        if not found:
            return None
        return LogitAdjustments(
            self._entries([(row, each.biased, each.biases) for row, _, each in found]),
            self._entries(
                [(row, each.banned, np.full(len(each.banned), each.banned_until)) for row, _, each in found]
            ),
            self._penalty_rows([one for one in found if one[2].penalties is not None], num_decodes),
            self._history,
        )

    def _keep(self, slot: int, tokens: IntArray) -> None:
        if self._history is None:
            self._history = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        self._history[slot, : len(tokens)] = upload_array(tokens.astype(np.int32), self._device)

    def _entries(self, parts: list[tuple[int, IntArray, np.ndarray]]) -> _Entries | None:
        rows = np.concatenate([np.full(len(tokens), row, np.int64) for row, tokens, _ in parts])
        if not rows.size:
            return None
        return _Entries(
            upload_array(rows, self._device),
            upload_array(np.concatenate([tokens for _, tokens, _ in parts]), self._device),
            upload_array(np.concatenate([values for _, _, values in parts]), self._device),
        )

    def _penalty_rows(self, found: list[tuple[int, int, _Adjusted]], num_decodes: int) -> _PenaltyRows | None:
        if not found:
            return None
        whole = np.array([(row, slot, each.output_from) for row, slot, each in found], np.int64).T
        rows, slots, output_from = upload_array(whole, self._device)
        strengths = np.array([each.penalties for _, _, each in found], np.float32).T[:, :, None]
        repetition, frequency, presence = upload_array(strengths, self._device)
        # Rows are in order, and the decoding ones come first.
        decodes = int(np.count_nonzero(whole[0] < num_decodes))
        return _PenaltyRows(
            rows, slots, output_from, repetition, frequency, presence, rows[:decodes], slots[:decodes]
        )


def note_sampled(history: Tensor, of: _PenaltyRows, positions: Tensor, last_tokens: Tensor) -> None:
    """Each decoding row got its last token in the step before; prompts were noted as they joined."""
    tokens = last_tokens[of.decode_slots].to(history.dtype)
    history.index_put_((of.decode_slots, positions[of.decode_rows] - 1), tokens)


def penalise(logits: Tensor, history: Tensor, of: _PenaltyRows, positions: Tensor) -> None:
    """Change the logits of tokens that are in a row's history [slots, at least the longest]. A token
    that is there several times is written as often, each time with the same value."""
    tokens = history.index_select(0, of.slots).long()
    column = torch.arange(tokens.shape[1], device=tokens.device)
    is_known = column < positions[of.rows].unsqueeze(1)
    is_output = is_known & (column >= of.output_from.unsqueeze(1))
    # What is not known stands for the first token, which is.
    tokens = torch.where(is_known, tokens, tokens[:, :1])
    at = (of.rows.unsqueeze(1), tokens)
    found = logits[at]
    logits.index_put_(at, torch.where(found > 0, found / of.repetition, found * of.repetition))
    logits.index_put_(at, torch.where(is_output, -of.frequency, 0.0), accumulate=True)
    # Where it is no output it stands for the first one, or for a token that stays as it is.
    first = torch.where(is_output.any(dim=1, keepdim=True), of.output_from.unsqueeze(1), 0)
    tokens = torch.where(is_output, tokens, tokens.gather(1, first))
    at = (of.rows.unsqueeze(1), tokens)
    presence = torch.where(is_output.any(dim=1, keepdim=True), of.presence, 0.0)
    logits.index_put_(at, logits[at] - presence)
