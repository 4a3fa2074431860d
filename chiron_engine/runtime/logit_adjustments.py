"""What requests ask of their logits before a token is chosen: biases, end tokens that come too early,
penalties on tokens that were there before, in this order.

Every change of a row depends on that request alone, so its batch-mates do not matter. Nothing is read
back from the device: tokens that were sampled there are known there.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from chiron_kernels.reference import penalties as reference
from torch import Tensor

from chiron_engine.model.kernel_choice import Kernels, best_kernels
from chiron_engine.policy.iteration.request import Request

from .uploads import IntArray, upload_array

FOR_EVER = np.iinfo(np.int64).max
"""Above every position: a bias does not end."""

HISTORY_DTYPE = torch.int32


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
    """Single logits. rows, tokens: int64 [E]. values: float32 [E], what to add while the row's position is
    below until, int64 [E]."""

    rows: Tensor
    tokens: Tensor
    values: Tensor
    until: Tensor


@dataclass(slots=True)
class _PenaltyRows:
    """P rows with penalties. rows, slots, output_from: int64 [P]. repetition, frequency, presence:
    float32 [P]. decode_rows, decode_slots: those of them that decode."""

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

    entries: _Entries | None
    penalties: _PenaltyRows | None
    history: Tensor | None

    def apply(
        self,
        logits: Tensor,
        positions: Tensor,
        last_tokens: Tensor,
        longest: int,
        kernels: Kernels | None = None,
    ) -> None:
        """Change `logits` [rows, vocab] float32 in place. positions: int64 [rows], the index in its
        sequence of the token to choose. last_tokens: int64 [slots], sampled last. longest: at least the
        largest position. kernels: None is the best for the device. To be called once for each token of a
        row, in order."""
        module = _module_of(kernels or best_kernels(logits.device))
        if self.entries is not None:
            of = self.entries
            module.adjust(logits, positions, of.rows, of.tokens, of.values, of.until)
        if self.penalties is not None and self.history is not None:
            note_sampled(self.history, self.penalties, positions, last_tokens)
            to = self.penalties
            module.penalise(
                logits,
                self.history[:, :longest],
                positions,
                to.rows,
                to.slots,
                to.output_from,
                to.repetition,
                to.frequency,
                to.presence,
            )


def _module_of(kernels: Kernels) -> ModuleType:
    """What has `adjust` and `penalise`."""
    if kernels is not Kernels.TRITON:
        return reference
    from chiron_kernels.gpu import penalties

    return penalties


def penalty_bytes(slots: int, longest: int, kernels: Kernels) -> int:
    """What penalties take on the device at most, with contexts of up to `longest` tokens in all slots: the
    tokens of each and, as Triton's kernel runs, their logits. Torch's temporaries are not in it."""
    logits = torch.float32.itemsize if kernels is Kernels.TRITON else 0
    return slots * longest * (HISTORY_DTYPE.itemsize + logits)


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
            self._entries([(row, each) for row, _, each in found]),
            self._penalty_rows([one for one in found if one[2].penalties is not None], num_decodes),
            self._history,
        )

    def _keep(self, slot: int, tokens: IntArray) -> None:
        if self._history is None:
            self._history = torch.zeros(self._shape, dtype=HISTORY_DTYPE, device=self._device)
        self._history[slot, : len(tokens)] = upload_array(tokens.astype(np.int32), self._device)

    def _entries(self, found: list[tuple[int, _Adjusted]]) -> _Entries | None:
        sizes = [len(each.biased) + len(each.banned) for _, each in found]
        if not sum(sizes):
            return None
        rows = np.repeat(np.array([row for row, _ in found], np.int64), sizes)
        tokens = np.concatenate([part for _, each in found for part in (each.biased, each.banned)])
        bans = [np.full(len(each.banned), -np.inf, np.float32) for _, each in found]
        values = np.concatenate(
            [part for (_, each), ban in zip(found, bans, strict=True) for part in (each.biases, ban)]
        )
        until = np.concatenate(
            [
                np.full(len(part), end, np.int64)
                for _, each in found
                for part, end in ((each.biased, FOR_EVER), (each.banned, each.banned_until))
            ]
        )
        rows_tokens_until = upload_array(np.stack((rows, tokens, until)), self._device)
        return _Entries(
            rows_tokens_until[0],
            rows_tokens_until[1],
            upload_array(values, self._device),
            rows_tokens_until[2],
        )

    def _penalty_rows(self, found: list[tuple[int, int, _Adjusted]], num_decodes: int) -> _PenaltyRows | None:
        if not found:
            return None
        whole = np.array([(row, slot, each.output_from) for row, slot, each in found], np.int64).T
        rows, slots, output_from = upload_array(whole, self._device)
        strengths = np.array([each.penalties for _, _, each in found], np.float32).T
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
