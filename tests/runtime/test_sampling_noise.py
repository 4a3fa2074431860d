"""The noise of sampling: known numbers, uniform and uncorrelated, finite at both ends."""

from __future__ import annotations

import math

import pytest
import torch
from chiron_kernels.reference.counter_noise import exponentials, item_keys, noise_bits, random_bits
from torch import Tensor

CPU = torch.device("cpu")
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """Steele, Lea and Flood 2014, in whole numbers: the output for a state already advanced."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def signed(value: int) -> int:
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


def test_splitmix64_yields_its_published_numbers() -> None:
    outputs = [splitmix64(1234567 + GOLDEN * (i + 1)) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 1, 77, 131071])
def test_random_bits_equal_whole_number_arithmetic(seed: int, position: int) -> None:
    expected = splitmix64(splitmix64(seed + GOLDEN) + GOLDEN * (position + 1))
    bits = random_bits(torch.tensor([signed(seed)]), torch.tensor([position]))
    assert int(bits[0]) & MASK == expected


def test_noise_bits_equal_whole_number_arithmetic() -> None:
    rows = [0, 1, 2**31, 2**63 - 1, 2**64 - 1, 0x0123456789ABCDEF]
    tokens, blocks = item_keys(512, 256, CPU)
    expected = [splitmix64((i + 1) * GOLDEN) for i in range(512)]
    assert [key & MASK for key in tokens.tolist()] == expected
    assert [key & MASK for key in blocks.tolist()] == [splitmix64(-(i + 1) * GOLDEN) for i in range(2)]
    noise = noise_bits(torch.tensor([signed(row) for row in rows]), tokens)
    assert noise.tolist() == [[signed(splitmix64(row + key)) for key in expected] for row in rows]


def uniforms(positions: int, items: int) -> Tensor:
    seeds = torch.full((positions,), 7)
    keys = item_keys(items, 1, CPU)[0]
    return unit(noise_bits(random_bits(seeds, torch.arange(positions)), keys))


def unit(bits: Tensor) -> Tensor:
    """int64 patterns to [0, 1)."""
    return (bits >> 1).double() / 2**63 + 0.5


def test_noise_is_uniform_and_uncorrelated() -> None:
    """Chi-square over 64 bins of the high and of the low bits; correlations between neighbouring tokens,
    neighbouring positions, and pairs of tokens whose keys differ in few bits."""
    numbers = uniforms(256, 512)
    for part in (numbers, (numbers * 2**35) % 1.0):
        seen = torch.histc(part.float(), bins=64, min=0, max=1)
        expected = numbers.numel() / 64
        assert float(((seen - expected) ** 2 / expected).sum()) < 63 + 5 * math.sqrt(2 * 63)
    centred = (numbers - 0.5) * math.sqrt(12)
    for left, right in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs(float((left * right).mean())) < 5 / math.sqrt(left.numel())


@pytest.mark.parametrize("bit", range(64))
def test_keys_that_differ_in_one_bit_get_independent_noise(bit: int) -> None:
    count = 20_000
    keys = torch.tensor([12345, 12345 ^ signed(1 << bit)])
    rows = random_bits(torch.zeros(count, dtype=torch.int64), torch.arange(count))
    first, second = (unit(noise_bits(rows, keys)) * 8).floor().long().T
    seen = torch.bincount(first * 8 + second, minlength=64).double()
    expected = count / 64
    assert float(((seen - expected) ** 2 / expected).sum()) < 63 + 5 * math.sqrt(2 * 63)


def test_exponentials_have_mean_and_spread_one_and_are_finite() -> None:
    rows = random_bits(torch.zeros(300, dtype=torch.int64), torch.arange(300))
    noise = exponentials(rows, item_keys(1000, 1, CPU)[0])
    assert float(noise.min()) > 0.0
    assert float(noise.max()) < math.inf
    assert abs(float(noise.mean()) - 1) < 5 / math.sqrt(noise.numel())
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(8 / noise.numel())
