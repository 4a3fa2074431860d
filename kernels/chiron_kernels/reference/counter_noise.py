"""Counter-based noise for sampling: a function of (seed, position, item) and of nothing else.

Hashes are whole numbers that wrap, so CPU and GPU agree bit for bit: the finaliser of splitmix64 (Steele,
Lea and Flood 2014) mixes the seed and the position, mixes the id of the item, a token or a block of
tokens, and mixes the sum of the two.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


def signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 bit patterns."""
    x = (x ^ _shift_right(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def random_bits(seeds: Tensor, positions: Tensor) -> Tensor:
    """64 random bits for each (seed, position), as int64.

    The number at `position` of the splitmix64 stream whose state starts at the mixed seed; mixing
    keeps the streams of neighbouring seeds from overlapping.
    """
    state = _mix(seeds + signed(_GOLDEN))
    return _mix(state + (positions + 1) * signed(_GOLDEN))


@lru_cache(maxsize=8)
def item_keys(tokens: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """64 mixed bits for each token id and for each block of so many, as int64 [tokens] and
    [tokens / block]. Tokens count up from 1 and blocks down from -1, so no two have the same."""
    ids = torch.arange(1, tokens + 1, device=device)
    return _mix(ids * signed(_GOLDEN)), _mix(-ids[: tokens // block] * signed(_GOLDEN))


def noise_bits(row_bits: Tensor, keys: Tensor) -> Tensor:
    """64 random bits for each (row, item), int64 [rows, items]. row_bits: [rows], of `random_bits`.
    keys: of the items, [items] or [rows, items]."""
    return _mix(row_bits.unsqueeze(1) + keys)


def exponentials(row_bits: Tensor, keys: Tensor) -> Tensor:
    """An exponential variate of mean 1 for each (row, item), float64, over zero and finite. Arguments
    as in `noise_bits`."""
    uniform = (_shift_right(noise_bits(row_bits, keys), 12).double() + 0.5) * 2.0**-52
    return -torch.log1p(-uniform)
