"""Softmax to the base 2: a GPU has instructions for 2^x and log2(x), and e^x = 2^(x log2(e))."""

from __future__ import annotations

import math

import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))

LOWEST = tl.constexpr(-1.0e38)
"""The highest score before the first one: below every score, yet finite, as -inf less -inf is no number."""
