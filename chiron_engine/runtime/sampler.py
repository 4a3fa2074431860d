"""Choose the next token of each row: greedy, temperature, min-p, top-k, top-p, in that order.

A draw is a race: among items of weight w, each scores w / E with exponential noise E of its own, and the
largest score wins, which happens in proportion to the weights. (In logarithms it is Gumbel-max:
log w - log E.) It is run twice, among blocks of RACE_BLOCK neighbouring token ids by the sum of their
weights, then among the tokens of the block that won; so noise is made for a few hundred items a row and
not for the vocabulary. It is a function of (seed, position, block or token id) alone. So a request that
goes on in another batch or on another engine draws the same token at the same position, although
rounding moves its logits a little: another one can win only where the two largest scores of a race, or a
token and the cut of min-p, top-k or top-p, lie within that rounding.

Compiled on CPUs that have the kernels; with torch elsewhere.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from chiron_kernels.cpu import sampling as compiled
from torch import Tensor

from chiron_engine.model.cpu_kernels import kernels_for
from chiron_engine.policy.iteration.sampling_params import SamplingParams

from .sampling_noise import exponentials, item_keys, random_bits, signed
from .uploads import upload_array

# Below this a temperature is greedy: the second best token would need a logit equal to the best.
MIN_TEMPERATURE = 1e-5
# Weights are whole numbers, exp(logit - largest) in units of 2**-32; a row of 2**20 of them sums below
# 2**53, so float64 holds every partial sum exactly: top-p cuts alike however a device splits a sum.
WEIGHT_SCALE = 2.0**32
RACE_BLOCK = 256


@dataclass(slots=True)
class SamplingRows:
    """Sampling parameters of the rows of one step that are not greedy, on the device, with what the
    host must know to leave out work: `all_greedy`, `any_min_p`, `largest_top_k` (0: no row has one),
    `any_top_p`. indices: which rows they are; None means all."""

    temperature: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    seeds: Tensor
    indices: Tensor | None
    all_greedy: bool
    any_min_p: bool
    largest_top_k: int
    any_top_p: bool


class SamplingTable:
    """The sampling parameters of every slot, on the host."""

    def __init__(self, max_slots: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._temperature = np.zeros(max_slots, np.float32)
        self._min_p = np.zeros(max_slots, np.float32)
        self._top_k = np.zeros(max_slots, np.int64)
        self._top_p = np.ones(max_slots, np.float64)
        self._seeds = np.zeros(max_slots, np.int64)

    def set(self, slot: int, params: SamplingParams, seed: int) -> None:
        greedy = params.temperature < MIN_TEMPERATURE
        self._temperature[slot] = 0.0 if greedy else params.temperature
        self._min_p[slot] = 0.0 if greedy else params.min_p
        keeps_all = greedy or params.top_k >= self._vocab_size
        self._top_k[slot] = 0 if keeps_all else params.top_k
        self._top_p[slot] = 1.0 if greedy else params.top_p
        self._seeds[slot] = signed(seed)

    def rows(self, slots: np.ndarray, device: torch.device) -> SamplingRows:
        """The parameters of the given slots, in their order."""
        drawn = np.flatnonzero(self._temperature[slots])
        if not drawn.size:
            empty = torch.empty(0)
            return SamplingRows(empty, empty, empty, empty, empty, None, True, False, 0, False)
        some = drawn.size < len(slots)
        slots = slots[drawn] if some else slots
        min_p, top_k, top_p = self._min_p[slots], self._top_k[slots], self._top_p[slots]
        return SamplingRows(
            upload_array(self._temperature[slots], device),
            upload_array(min_p, device),
            upload_array(top_k, device),
            upload_array(top_p, device),
            upload_array(self._seeds[slots], device),
            upload_array(drawn, device) if some else None,
            False,
            bool(min_p.any()),
            int(top_k.max()),
            bool((top_p < 1.0).any()),
        )


def sample(logits: Tensor, rows: SamplingRows, positions: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row.

    logits: [rows, vocab] float32. positions: [rows] int64, the index in its sequence of the token
    to draw. Returns the tokens [rows] int64 and [rows] bool, False where no logit was above -inf:
    such a row gets token 0. NaN counts as -inf and +inf as the largest finite number.
    """
    kernels = kernels_for(logits.device)
    if kernels is not None:
        return _sample_compiled(kernels, logits, rows, positions)
    return _sample_with_torch(logits, rows, positions)


def _sample_compiled(
    kernels: ctypes.CDLL, logits: Tensor, rows: SamplingRows, positions: Tensor
) -> tuple[Tensor, Tensor]:
    if rows.all_greedy or rows.indices is not None:
        best, tokens = compiled.row_maxima(kernels, logits)
    else:
        best, tokens = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.int64)
    if not rows.all_greedy:
        draws = compiled.Draws(rows.temperature, rows.min_p, rows.top_k, rows.top_p, rows.seeds)
        compiled.draw(kernels, logits, positions, rows.indices, draws, best, tokens)
    return tokens, best > -torch.inf


def _sample_with_torch(logits: Tensor, rows: SamplingRows, positions: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.finfo(logits.dtype).max, neginf=-torch.inf)
    best, tokens = logits.max(dim=-1)
    valid = best > -torch.inf
    if not rows.all_greedy and rows.indices is None:
        tokens = _draw(logits, best, rows, positions)
    elif rows.indices is not None:
        some = rows.indices
        tokens[some] = _draw(logits[some], best[some], rows, positions[some])
    return torch.where(valid, tokens, 0), valid


def _draw(logits: Tensor, best: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """A draw for every row; one without a logit above -inf gets an arbitrary token id."""
    weights = _weights(logits, best, rows.temperature)
    if rows.any_min_p:
        _keep_at_least(weights, weights, (rows.min_p * WEIGHT_SCALE).unsqueeze(1))
    if rows.largest_top_k:
        _keep_top_k(weights, logits, rows)
    if rows.any_top_p:
        _keep_top_p(weights, rows.top_p)
    return _race(weights, random_bits(rows.seeds, positions)).clamp_(max=logits.shape[1] - 1)


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


def _keep_top_k(weights: Tensor, logits: Tensor, rows: SamplingRows) -> None:
    """Zero the weights of tokens under each row's k-th largest logit; tokens equal to it stay."""
    kept = logits.topk(rows.largest_top_k, dim=-1).values
    kth = kept.gather(1, (rows.top_k - 1).clamp(min=0).unsqueeze(1))
    kth.masked_fill_((rows.top_k == 0).unsqueeze(1), -torch.inf)
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
