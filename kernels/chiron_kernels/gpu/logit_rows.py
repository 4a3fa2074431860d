"""What the kernels over rows of logits have in common: reading them, their order, and their blocks.

A row is cut into blocks of RACE_BLOCK neighbouring tokens. The largest logit of every block, which one pass
over all logits finds, tells later kernels which blocks they need not read again:

    row of logits    | block 0 | block 1 | block 2 | ... | the last, padded with -inf |
    block_maxima         3.1       7.5      -2.0     ...       0.4
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.checks import check_dtype, check_last_dense, check_shape
from chiron_kernels.gpu.launch import Launch, power_of_two_from

RACE_BLOCK = tl.constexpr(256)
LARGEST_FINITE = tl.constexpr(3.4028234663852886e38)
LARGEST_KEY = tl.constexpr(0x7FFFFFFF)
NO_KEY = tl.constexpr(-0x80000000)
"""Below that of any number, -inf too."""
WIDEST = 2**19
"""Tokens of a row; `COUNT_SHIFT` in selection.py counts on it."""


@triton.jit
def finite(x):
    """NaN as -inf and +inf as the largest finite number."""
    return tl.minimum(tl.maximum(x, float("-inf")), LARGEST_FINITE)  # of NaN and a number, max is the number


@triton.jit
def load_blocks(row, vocab, blocks, wanted):
    """Logits of blocks [N] of a row, [N, RACE_BLOCK], as they lie; -inf past the end of the row and for
    blocks that are not wanted."""
    tokens = blocks[:, None] * RACE_BLOCK + tl.arange(0, RACE_BLOCK)[None, :]
    return tl.load(row + tokens, mask=wanted[:, None] & (tokens < vocab), other=float("-inf"))


@triton.jit
def ordered_keys(x):
    """Whole numbers, int32, in the order of the float32."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & LARGEST_KEY)


@triton.jit
def float_of_key(key):
    """The inverse of ordered_keys."""
    return (key ^ ((key >> 31) & LARGEST_KEY)).to(tl.float32, bitcast=True)


@triton.jit
def first_largest(row, vocab, maxima, best, BLOCKS: tl.constexpr):
    """The first token whose logit is `best`, the largest of maxima [BLOCKS]."""
    numbers = tl.arange(0, BLOCKS)
    block = tl.min(tl.where(maxima == best, numbers, BLOCKS - 1), axis=0)
    tokens = block * RACE_BLOCK + tl.arange(0, RACE_BLOCK)
    x = finite(tl.load(row + tokens, mask=tokens < vocab, other=float("-inf")))
    return tl.min(tl.where((x == best) & (tokens < vocab), tokens, vocab - 1), axis=0)


@triton.jit
def _block_maxima(
    logits,  # [R, V], rows `stride` apart
    stride,
    vocab,  # V
    maxima,  # [R, number of blocks] out
    blocks,
    TILE: tl.constexpr,  # blocks of one program
):
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = load_blocks(logits + row * stride, vocab, numbers, numbers < blocks)
    tl.store(maxima + row * blocks + numbers, tl.max(finite(x), axis=1), mask=numbers < blocks)


FEW_ROWS = 32
"""Up to so many, small programs: 128,000 tokens of one row are 63 of them."""


def tile_of_blocks(rows: int) -> tuple[int, int]:
    """Blocks of one program of a pass over all logits, and its warps: four loads of 16 bytes a thread."""
    return (8, 4) if rows <= FEW_ROWS else (32, 16)


def number_of_blocks(vocab: int) -> int:
    return -(-vocab // RACE_BLOCK.value)


def padded_blocks(vocab: int) -> int:
    """The power of two from the number of blocks up: what one program of a row holds."""
    return power_of_two_from(number_of_blocks(vocab))


def check_logits(logits: torch.Tensor) -> None:
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits, (torch.float32,))
    check_last_dense("logits", logits)
    if not 0 < logits.shape[1] <= WIDEST:
        raise ValueError(f"logits has rows of {logits.shape[1]}; they must be of 1 to {WIDEST}")


def block_maxima_launch(logits: torch.Tensor, maxima: torch.Tensor) -> Launch:
    """maxima: float32 [R, blocks], written. logits as `check_logits` has them; the caller has checked
    both."""
    rows, vocab = logits.shape
    blocks = number_of_blocks(vocab)
    tile, warps = tile_of_blocks(rows)
    return Launch(
        _block_maxima,
        (rows, -(-blocks // tile)),
        {
            "logits": logits,
            "stride": logits.stride(0),
            "vocab": vocab,
            "maxima": maxima,
            "blocks": blocks,
            "TILE": tile,
        },
        num_warps=warps,
        num_stages=1,
    )
