"""The next token of each row: greedy, temperature, min-p, top-k, top-p, in that order.

A draw is a race: among items of weight w, each scores w / E with exponential noise E of its own, and the
largest score wins, which happens in proportion to the weights. (In logarithms it is Gumbel-max:
log w - log E.) It is run twice, among blocks of RACE_BLOCK neighbouring token ids by the sum of their
weights, then among the tokens of the block that won; so noise is made for a few hundred items a row and
not for the vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from chiron_kernels.reference.counter_noise import exponentials, item_keys, random_bits

# Below this a temperature is greedy: the second best token would need a logit equal to the best.
MIN_TEMPERATURE = 1e-5
# Weights are whole numbers, exp(logit - largest) in units of 2**-32; a row of 2**20 of them sums below
# 2**53, so float64 holds every partial sum exactly: top-p cuts alike however a device splits a sum.
WEIGHT_SCALE = 2.0**32
RACE_BLOCK = 256


def sample_rows(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    filtered: bool = True,
) -> tuple[Tensor, Tensor]:
    """One token for each row of logits: int64 [R], and bool [R], False where no logit was above -inf; such a
    row gets token 0.

    logits: float32 [R, V]; NaN counts as -inf and +inf as the largest finite number. Of each row: temperature
    float32, greedy below MIN_TEMPERATURE; min_p float32, 0 for none; top_k int64, 0 for all; top_p float64, 1
    for all; seeds int64; positions int64, the index of the token in its sequence. filtered: whether
    any row asks for top_k or top_p."""
    logits = finite(logits)
    best, first = logits.max(dim=-1)
    greedy, valid = temperature < MIN_TEMPERATURE, best > -torch.inf
    asked = torch.where(top_k < logits.shape[1], top_k, 0)
    drawn = draw(
        logits,
        best,
        torch.where(greedy, 1.0, temperature),
        min_p,
        asked,
        top_p,
        random_bits(seeds, positions),
        any_min_p=True,
        largest_top_k=int(asked.max()) if filtered and len(asked) else 0,
        any_top_p=filtered,
    )
    return torch.where(valid, torch.where(greedy, first, drawn), 0), valid


def greedy_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first token with the largest logit of each row, as `sample_rows` of temperature 0."""
    best, tokens = finite(logits).max(dim=-1)
    valid = best > -torch.inf
    return torch.where(valid, tokens, 0), valid


def finite(logits: Tensor) -> Tensor:
    """A copy with NaN as -inf and +inf as the largest finite number."""
    return logits.nan_to_num(nan=-torch.inf, posinf=torch.finfo(logits.dtype).max, neginf=-torch.inf)


def draw(
    logits: Tensor,
    best: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    row_bits: Tensor,
    *,
    any_min_p: bool,
    largest_top_k: int,
    any_top_p: bool,
) -> Tensor:
    """A draw for every row, int64 [R]; one without a logit above -inf gets an arbitrary token id.

    logits: [R, V], finite or -inf, the largest of each row in best [R]. row_bits: of `random_bits`. top_k: of
    no row larger than largest_top_k, which is at most V."""
    weights = _weights(logits, best, temperature)
    if any_min_p:
        _keep_at_least(weights, weights, (min_p * WEIGHT_SCALE).unsqueeze(1))
    if largest_top_k:
        _keep_top_k(weights, logits, top_k, largest_top_k)
    if any_top_p:
        _keep_top_p(weights, top_p)
    return _race(weights, row_bits).clamp_(max=logits.shape[1] - 1)


def _weights(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Whole-number weights [rows, vocab rounded up to RACE_BLOCK], float32; the likeliest token has
    WEIGHT_SCALE. The largest logit is subtracted before the division, so no temperature overflows."""
    rows, vocab = logits.shape
    padded = -(-vocab // RACE_BLOCK) * RACE_BLOCK
    weights = torch.empty(rows, padded, dtype=torch.float32, device=logits.device)
    weights[:, vocab:] = 0.0
    view = weights[:, :vocab]
    torch.sub(logits, best.unsqueeze(1), out=view)
    view.div_(temperature.unsqueeze(1)).exp_().mul_(WEIGHT_SCALE).floor_()
    return weights


def _keep_top_k(weights: Tensor, logits: Tensor, top_k: Tensor, largest: int) -> None:
    """Zero the weights of tokens under each row's k-th largest logit; tokens equal to it stay."""
    kept = logits.topk(largest, dim=-1).values
    kth = kept.gather(1, (top_k - 1).clamp(min=0).unsqueeze(1))
    kth.masked_fill_((top_k == 0).unsqueeze(1), -torch.inf)
    _keep_at_least(weights[:, : logits.shape[1]], logits, kth)


def _keep_top_p(weights: Tensor, top_p: Tensor) -> None:
    """Zero the weights below each row's threshold: the largest value such that the tokens of at
    least that weight hold the share `top_p` of the whole. Tokens equal to the threshold stay."""
    keeps_all = (top_p >= 1.0).unsqueeze(1)
    needed = (weights.sum(dim=-1, dtype=torch.float64) * top_p).unsqueeze(1)
    needed.masked_fill_(keeps_all, 0.0)
    if weights.device.type == "cpu":
        threshold = threshold_by_sorting(weights, needed)
    else:
        threshold = threshold_by_bisection(weights, needed)
    threshold.masked_fill_(keeps_all, 0.0)
    _keep_at_least(weights, weights, threshold)


def _keep_at_least(weights: Tensor, values: Tensor, least: Tensor) -> None:
    """Zero the weights where `values` [rows, some] are below `least` [rows, 1]. By a product: on the CPU a
    masked fill branches for each token."""
    weights.mul_(values >= least)


def threshold_by_sorting(weights: Tensor, needed: Tensor) -> Tensor:
    """The largest t with sum(weights >= t) >= needed, [rows, 1], by sorting each row, which numpy does
    several times quicker than torch."""
    ordered = np.sort(weights.numpy(), axis=1)[:, ::-1]
    reached = ordered.cumsum(axis=1, dtype=np.float64) >= needed.numpy()
    return torch.from_numpy(np.take_along_axis(ordered, reached.argmax(axis=1)[:, None], axis=1))


def threshold_by_bisection(weights: Tensor, needed: Tensor) -> Tensor:
    """The same threshold, bit by bit over the patterns of non-negative floats (they order as the
    numbers do), with no read on the host."""
    bits = torch.zeros(weights.shape[0], 1, dtype=torch.int32, device=weights.device)
    for bit in range(30, -1, -1):
        trial = bits | (1 << bit)
        kept = weights.where(weights >= trial.view(torch.float32), 0.0)
        enough = kept.sum(dim=-1, keepdim=True, dtype=torch.float64) >= needed
        bits = torch.where(enough, trial, bits)
    return bits.view(torch.float32)


def _race(weights: Tensor, row_bits: Tensor) -> Tensor:
    """The token that wins in each row, [rows] int64. weights: [rows, vocab], vocab a multiple of
    RACE_BLOCK. row_bits: of `random_bits`, for each row."""
    blocks = weights.view(weights.shape[0], -1, RACE_BLOCK)
    block_weights = blocks.sum(dim=-1, dtype=torch.float64)
    token_keys, block_keys = item_keys(weights.shape[1], RACE_BLOCK, weights.device)
    block = _winner(block_weights, row_bits, block_keys)
    inside = blocks[torch.arange(len(block), device=block.device), block]
    return block * RACE_BLOCK + _winner(inside, row_bits, token_keys.view(-1, RACE_BLOCK)[block])


def _winner(weights: Tensor, row_bits: Tensor, keys: Tensor) -> Tensor:
    """Never an item of weight 0 where another has more: its score is 0, and noise is finite."""
    return (weights / exponentials(row_bits, keys)).argmax(dim=-1)
