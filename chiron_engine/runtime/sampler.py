"""Choose the next token of each row: greedy, temperature, top-k, top-p, in that order.

Randomness is counter-based: a row draws one uniform number that is a function of (seed, position)
alone, and inverts the cumulative distribution of the tokens its filters leave, in vocabulary
order. Weights are whole numbers held in floating point, so their sums are exact in any order of
addition: for given logits a row's token depends neither on its batch mates nor on how a device splits
a sum. The logits themselves may move by rounding with the number of rows; a draw that falls next to
the boundary of two tokens can then go to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chiron_engine.policy.iteration.request import SamplingParams

# Below this a temperature is greedy: the second best token would need a logit equal to the best.
MIN_TEMPERATURE = 1e-5
# Weights are exp(logit - largest) in units of 2**-32; a row of 2**20 of them sums below 2**53, so
# float64 holds every partial sum exactly.
WEIGHT_SCALE = 2.0**32
CDF_BLOCK = 256
TOP_P_FIRST_TRY = 64

_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014) on int64 bit patterns."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def random_bits(seeds: Tensor, positions: Tensor) -> Tensor:
    """64 random bits for each (seed, position), as int64.

    The number at `position` of the splitmix64 stream whose state starts at the mixed seed; mixing
    keeps the streams of neighbouring seeds from overlapping.
    """
    state = _mix(seeds + _signed(_GOLDEN))
    return _mix(state + (positions + 1) * _signed(_GOLDEN))


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """A float64 in [0, 1) with 53 random bits for each (seed, position)."""
    return _shift_right(random_bits(seeds, positions), 11).double() * 2.0**-53


@dataclass(slots=True)
class SamplingRows:
    """Sampling parameters of the rows of one step, on the device, with what the host must know to
    leave out work: `all_greedy`, `largest_top_k` (0: no row has one), `any_top_p`."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seeds: Tensor
    all_greedy: bool
    largest_top_k: int
    any_top_p: bool


class SamplingTable:
    """The sampling parameters of every slot, on the host."""

    def __init__(self, max_slots: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._temperature = np.zeros(max_slots, np.float32)
        self._top_k = np.zeros(max_slots, np.int64)
        self._top_p = np.ones(max_slots, np.float64)
        self._seeds = np.zeros(max_slots, np.int64)

    def set(self, slot: int, params: SamplingParams, seed: int) -> None:
        greedy = params.temperature < MIN_TEMPERATURE
        self._temperature[slot] = 0.0 if greedy else params.temperature
        keeps_all = greedy or params.top_k >= self._vocab_size
        self._top_k[slot] = 0 if keeps_all else params.top_k
        self._top_p[slot] = 1.0 if greedy else params.top_p
        self._seeds[slot] = _signed(seed)

    def rows(self, slots: np.ndarray, device: torch.device) -> SamplingRows:
        """The parameters of the given slots, in their order."""
        temperature, top_k, top_p = self._temperature[slots], self._top_k[slots], self._top_p[slots]
        if not temperature.any():
            empty = torch.empty(0)
            return SamplingRows(empty, empty, empty, empty, True, 0, False)

        def upload(array: np.ndarray) -> Tensor:
            return upload_array(array, device)

        return SamplingRows(
            upload(temperature),
            upload(top_k),
            upload(top_p),
            upload(self._seeds[slots]),
            False,
            int(top_k.max()),
            bool((top_p < 1.0).any()),
        )


def upload_array(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device. On CUDA it goes through pinned memory, so the host does not wait; the
    allocator keeps the pinned memory until the copy is made."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return host.clone()
    if not array.size:
        return torch.empty(array.shape, dtype=host.dtype, device=device)
    return host.pin_memory().to(device, non_blocking=True)


def sample(logits: Tensor, rows: SamplingRows, positions: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row.

    logits: [rows, vocab] float32. positions: [rows] int64, the index in its sequence of the token
    to draw. Returns the tokens [rows] int64 and [rows] bool, False where no logit was above -inf:
    such a row gets token 0. NaN counts as -inf and +inf as the largest finite number.
    """
    best, tokens = logits.max(dim=-1)
    if logits.device.type != "cpu" or not bool(torch.isfinite(best).all()):
        logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.finfo(logits.dtype).max, neginf=-torch.inf)
        best, tokens = logits.max(dim=-1)
    valid = best > -torch.inf
    if not rows.all_greedy:
        drawn = _draw(logits, best, rows, positions)
        tokens = torch.where(rows.temperature > 0, drawn, tokens)
    return torch.where(valid, tokens, 0), valid


def _draw(logits: Tensor, best: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """A draw for every row; rows that are greedy or not valid get an arbitrary token id."""
    weights = _weights(logits, best, rows.temperature)
    if rows.largest_top_k:
        _keep_top_k(weights, logits, rows)
    if rows.any_top_p:
        _keep_top_p(weights, rows.top_p)
    return _invert_cdf(weights, uniform(rows.seeds, positions)).clamp_(max=logits.shape[1] - 1)


def _weights(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Whole-number weights [rows, vocab rounded up to CDF_BLOCK], float32; the likeliest token has
    WEIGHT_SCALE. The largest logit is subtracted before the division, so no temperature overflows."""
    rows, vocab = logits.shape
    padded = -(-vocab // CDF_BLOCK) * CDF_BLOCK
    weights = torch.empty(rows, padded, dtype=torch.float32, device=logits.device)
    weights[:, vocab:] = 0.0
    view = weights[:, :vocab]
    torch.sub(logits, best.unsqueeze(1), out=view)
    view.div_(temperature.clamp(min=MIN_TEMPERATURE).unsqueeze(1))
    view.exp_().mul_(WEIGHT_SCALE).floor_()
    return weights


def _keep_top_k(weights: Tensor, logits: Tensor, rows: SamplingRows) -> None:
    """Zero the weights of tokens under each row's k-th largest logit; tokens equal to it stay."""
    largest = logits.topk(rows.largest_top_k, dim=-1).values
    kth = largest.gather(1, (rows.top_k - 1).clamp(min=0).unsqueeze(1))
    kth.masked_fill_((rows.top_k == 0).unsqueeze(1), -torch.inf)
    weights[:, : logits.shape[1]].masked_fill_(logits < kth, 0.0)


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
    weights.masked_fill_(weights < threshold, 0.0)


def threshold_by_sorting(weights: Tensor, needed: Tensor) -> Tensor:
    """The largest t with sum(weights >= t) >= needed, [rows, 1], by sorting the heaviest few
    tokens, and more of them only for rows where these do not suffice. Reads results on the host."""
    threshold = torch.zeros(weights.shape[0], 1, dtype=weights.dtype, device=weights.device)
    open_rows = torch.arange(weights.shape[0], device=weights.device)
    count = min(TOP_P_FIRST_TRY, weights.shape[1])
    while open_rows.numel():
        heaviest = weights.index_select(0, open_rows).topk(count, dim=-1).values
        reached = heaviest.cumsum(dim=-1, dtype=torch.float64) >= needed.index_select(0, open_rows)
        found = reached.any(dim=-1)
        first = reached.to(torch.uint8).argmax(dim=-1, keepdim=True)
        done = found.nonzero().squeeze(1)
        threshold[open_rows[done]] = heaviest.gather(1, first)[done]
        if count == weights.shape[1]:
            break
        open_rows = open_rows[~found]
        count = min(count * 16, weights.shape[1])
    return threshold


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


def _invert_cdf(weights: Tensor, draws: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds draw x total: the block of tokens first, then
    the token inside it. weights: [rows, vocab], vocab a multiple of CDF_BLOCK."""
    rows = weights.shape[0]
    blocks = weights.view(rows, -1, CDF_BLOCK)
    block_cdf = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = (draws * block_cdf[:, -1]).floor().unsqueeze(1)
    last = block_cdf.shape[1] - 1
    block = torch.searchsorted(block_cdf, target, right=True).clamp_(max=last)
    before = block_cdf.gather(1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0.0)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, CDF_BLOCK)).squeeze(1)
    offset = torch.searchsorted(inside.cumsum(dim=-1, dtype=torch.float64), target - before, right=True)
    return (block * CDF_BLOCK + offset.clamp_(max=CDF_BLOCK - 1)).squeeze(1)
