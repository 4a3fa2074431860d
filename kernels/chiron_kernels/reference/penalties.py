"""What requests ask of their logits: single logits moved or banned, and penalties on tokens that were there
before."""

from __future__ import annotations

import torch
from torch import Tensor


def adjust(
    logits: Tensor, positions: Tensor, rows: Tensor, tokens: Tensor, values: Tensor, until: Tensor
) -> None:
    """Add values float32 [E] to single logits, those of tokens int64 [E] in rows int64 [E], as long as the
    row's position is below until int64 [E]. A bias is added up to the largest int64; a ban adds -inf.

    logits: float32 [R, V], changed. positions: int64 [R]."""
    wanted = torch.where(positions[rows] < until, values, 0.0)
    logits.index_put_((rows, tokens), wanted, accumulate=True)


def penalise(
    logits: Tensor,
    history: Tensor,
    positions: Tensor,
    rows: Tensor,
    slots: Tensor,
    output_from: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Penalise the tokens of P rows' histories: a logit above 0 is divided by the repetition penalty, another
    is multiplied by it; of a token that was put out the frequency penalty is taken off as often as it was,
    then the presence penalty once.

    logits: float32 [R, V], changed. history: int32 [slots, longest]; of a slot the tokens before its row's
    position are known, and those from output_from on were put out. positions: int64 [R]. rows, slots,
    output_from: int64 [P], each row there once. repetition, frequency, presence: float32 [P]. A token that is
    there several times is written as often, each time with the same value."""
    repetition, frequency, presence = (each.unsqueeze(1) for each in (repetition, frequency, presence))
    tokens = history.index_select(0, slots).long()
    column = torch.arange(tokens.shape[1], device=tokens.device)
    is_known = column < positions[rows].unsqueeze(1)
    is_output = is_known & (column >= output_from.unsqueeze(1))
    # What is not known stands for the first token, which is.
    tokens = torch.where(is_known, tokens, tokens[:, :1])
    at = (rows.unsqueeze(1), tokens)
    found = logits[at]
    logits.index_put_(at, torch.where(found > 0, found / repetition, found * repetition))
    logits.index_put_(at, torch.where(is_output, -frequency, 0.0), accumulate=True)
    # Where it is no output it stands for the first one, or for a token that stays as it is.
    first = torch.where(is_output.any(dim=1, keepdim=True), output_from.unsqueeze(1), 0)
    tokens = torch.where(is_output, tokens, tokens.gather(1, first))
    at = (rows.unsqueeze(1), tokens)
    once = torch.where(is_output.any(dim=1, keepdim=True), presence, 0.0)
    logits.index_put_(at, logits[at] - once)
