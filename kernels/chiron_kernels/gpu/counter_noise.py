"""Counter-based noise: a function of (seed, position, item) and of nothing else.

The finaliser of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")
mixes the seed and the position, mixes the id of the item, and mixes the sum of the two. All of it is
wrapping arithmetic of 64-bit whole numbers, so these are the CPU's numbers, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB)
UNIT = tl.constexpr(2.0**-52)


@triton.jit
def mix(x):
    """The finaliser, of uint64."""
    x = (x ^ (x >> 30)) * FIRST_FACTOR
    x = (x ^ (x >> 27)) * SECOND_FACTOR
    return x ^ (x >> 31)


@triton.jit
def random_bits(seed, position):
    """64 random bits for each int64 seed and position."""
    state = mix(seed.to(tl.uint64) + GOLDEN)
    return mix(state + (position + 1).to(tl.uint64) * GOLDEN)


@triton.jit
def token_keys(tokens):
    """64 mixed bits for each token id. Tokens count up from 1 and blocks down from -1, so that no two items
    have the same."""
    return mix((tokens.to(tl.int64) + 1).to(tl.uint64) * GOLDEN)


@triton.jit
def block_keys(blocks):
    """64 mixed bits for each number of a block of tokens."""
    return mix((-1 - blocks.to(tl.int64)).to(tl.uint64) * GOLDEN)


@triton.jit
def exponentials(row_bits, keys):
    """An exponential variate of mean 1 for each key, float64, over zero and finite.

    The uniform u is (k + 1/2) / 2**52 for a k of 52 bits, so 1 - u has 53 bits and is exact: its logarithm
    loses nothing that log1p would keep."""
    high = (mix(row_bits + keys) >> 12).to(tl.int64).to(tl.float64)
    uniform = (high + 0.5) * UNIT
    return -tl.log(1.0 - uniform)
