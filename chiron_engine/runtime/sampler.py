"""Choose the next token of each row: greedy, temperature, min-p, top-k, top-p, in that order.

A draw is a race: among items of weight w, each scores w / E with exponential noise E of its own, and the
largest score wins, which happens in proportion to the weights. (In logarithms it is Gumbel-max:
log w - log E.) It is run twice, among blocks of RACE_BLOCK neighbouring token ids by the sum of their
weights, then among the tokens of the block that won; so noise is made for a few hundred items a row and
not for the vocabulary. It is a function of (seed, position, block or token id) alone. So a request that
goes on in another batch or on another engine draws the same token at the same position, although
rounding moves its logits a little: another one can win only where the two largest scores of a race, or a
token and the cut of min-p, top-k or top-p, lie within that rounding.

On GPUs by Triton kernels, compiled on CPUs that have the kernels, with torch elsewhere.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from chiron_kernels.cpu import sampling as compiled
from chiron_kernels.reference.counter_noise import random_bits, signed
from chiron_kernels.reference.sampling import MIN_TEMPERATURE, draw, finite
from torch import Tensor

from chiron_engine.model.kernel_choice import Kernels, best_kernels, library_of
from chiron_engine.policy.iteration.sampling_params import SamplingParams

from .uploads import upload_array


@dataclass(slots=True)
class SamplingRows:
    """Sampling parameters of the rows of one step that are not greedy, on the device, with what the host must
    know to leave out work: `all_greedy`, `any_min_p`, `largest_top_k` (0: no row has one), `any_top_p`.
    indices: which rows they are; None means all, with temperature 0 for the greedy ones."""

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
    """The sampling parameters of every slot, on the host. every_row: Triton's kernels want those of greedy
    rows beside others, too."""

    def __init__(self, max_slots: int, vocab_size: int, every_row: bool = False) -> None:
        self._vocab_size = vocab_size
        self._every_row = every_row
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
        some = drawn.size < len(slots) and not self._every_row
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


def sample(
    logits: Tensor, rows: SamplingRows, positions: Tensor, kernels: Kernels | None = None
) -> tuple[Tensor, Tensor]:
    """One token for each row.

    logits: [rows, vocab] float32. positions: [rows] int64, the index in its sequence of the token
    to draw. Returns the tokens [rows] int64 and [rows] bool, False where no logit was above -inf:
    such a row gets token 0. NaN counts as -inf and +inf as the largest finite number. kernels: None is
    the best for the device; Triton's want rows of a table with every_row.
    """
    kernels = kernels or best_kernels(logits.device)
    if kernels is Kernels.TRITON:
        return _sample_with_triton(logits, rows, positions)
    library = library_of(kernels, logits.device)
    if library is not None:
        return _sample_compiled(library, logits, rows, positions)
    return _sample_with_torch(logits, rows, positions)


def _sample_with_triton(logits: Tensor, rows: SamplingRows, positions: Tensor) -> tuple[Tensor, Tensor]:
    from chiron_kernels.gpu.sampling import greedy_rows, sample_rows

    if rows.all_greedy:
        return greedy_rows(logits)
    return sample_rows(
        logits,
        rows.temperature,
        rows.min_p,
        rows.top_k,
        rows.top_p,
        rows.seeds,
        positions,
        filtered=rows.largest_top_k > 0 or rows.any_top_p,
    )


def _sample_compiled(
    library: ctypes.CDLL, logits: Tensor, rows: SamplingRows, positions: Tensor
) -> tuple[Tensor, Tensor]:
    if rows.all_greedy or rows.indices is not None:
        best, tokens = compiled.row_maxima(library, logits)
    else:
        best, tokens = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.int64)
    if not rows.all_greedy:
        draws = compiled.Draws(rows.temperature, rows.min_p, rows.top_k, rows.top_p, rows.seeds)
        compiled.draw(library, logits, positions, rows.indices, draws, best, tokens)
    return tokens, best > -torch.inf


def _sample_with_torch(logits: Tensor, rows: SamplingRows, positions: Tensor) -> tuple[Tensor, Tensor]:
    logits = finite(logits)
    best, tokens = logits.max(dim=-1)
    valid = best > -torch.inf
    if not rows.all_greedy and rows.indices is None:
        tokens = _draw(logits, best, rows, positions)
    elif rows.indices is not None:
        some = rows.indices
        tokens[some] = _draw(logits[some], best[some], rows, positions[some])
    return torch.where(valid, tokens, 0), valid


def _draw(logits: Tensor, best: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    return draw(
        logits,
        best,
        rows.temperature,
        rows.min_p,
        rows.top_k,
        rows.top_p,
        random_bits(rows.seeds, positions),
        any_min_p=rows.any_min_p,
        largest_top_k=rows.largest_top_k,
        any_top_p=rows.any_top_p,
    )
