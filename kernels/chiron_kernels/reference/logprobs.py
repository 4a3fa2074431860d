"""How likely the model had chosen tokens, their ranks, and which tokens were the likeliest."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 32
"""Of logits that are copied."""


def token_logprobs(
    logits: Tensor, rows: Tensor, tokens: Tensor, few: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logarithms of probabilities in the rows `rows` int64 [N] of logits float32 [R, V]: of the row's token,
    float32 [N]; ids int64 [N, few] and logarithms float32 [N, few] of the `few` likeliest, the likeliest
    first; and the ranks of the tokens, int64 [N], 1 for the likeliest. tokens: int64 [R]."""
    chosen, ids, top, ranks = [], [], [], []
    for part in rows.split(ROWS_AT_ONCE):
        some, of_part = logits.index_select(0, part), tokens[part]
        total = torch.logsumexp(some, dim=-1, keepdim=True)
        chosen.append((some.gather(1, of_part.unsqueeze(1)) - total).squeeze(1))
        best, places = some.topk(few, dim=-1)
        ids.append(places)
        top.append(best - total)
        ranks.append(ranks_of(some, of_part))
    return torch.cat(chosen), torch.cat(ids), torch.cat(top), torch.cat(ranks)


def ranks_of(logits: Tensor, targets: Tensor) -> Tensor:
    """1 for the likeliest token of a row."""
    return (logits > logits.gather(1, targets.unsqueeze(1))).sum(dim=-1) + 1
