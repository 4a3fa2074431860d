"""The next token of each row: greedy, temperature, min-p, top-k, top-p, in that order.

A draw is a race: among items of weight w, each scores w / E with exponential noise E of its own, and the
largest score wins, which happens in proportion to the weights. It is run among blocks of RACE_BLOCK
neighbouring tokens by the sum of their weights, then among the tokens of the block that won. Weights are
whole numbers, so their sums are exact however they are added, and the noise is a function of (seed, position,
item): a row's token depends on neither its batch-mates nor the number of programs.

Two launches. The first reads all logits, spread over many programs, and finds the largest of each block. In
the second each row is one program's, which reads again only the blocks that can still have a part in the
result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.base_two import LOG2_E
from chiron_kernels.gpu.checks import check_vectors
from chiron_kernels.gpu.counter_noise import block_keys, exponentials, random_bits, token_keys
from chiron_kernels.gpu.launch import Launch
from chiron_kernels.gpu.logit_rows import (
    LARGEST_KEY,
    NO_KEY,
    RACE_BLOCK,
    block_maxima_launch,
    check_logits,
    finite,
    first_largest,
    float_of_key,
    number_of_blocks,
    ordered_keys,
    padded_blocks,
)
from chiron_kernels.gpu.selection import (
    BELOW_ONE_KEY,
    ROOM,
    TILE,
    WEIGHT_SCALE,
    WEIGHT_SCALE_KEY,
    find_threshold,
    halve,
    kept_weights,
    list_blocks,
    load_listed,
    logit_bound,
)

MIN_TEMPERATURE = tl.constexpr(1e-5)
"""Below this a temperature is greedy: the second best token would need a logit equal to the best."""
LOWEST_KEY = tl.constexpr(-0x7F800001)
"""ordered_keys(-inf)"""


@triton.jit
def _kth_largest(row, vocab, maxima, blocks, listed, candidates, values, best, top_k, BLOCKS: tl.constexpr):
    """The top_k-th largest logit of a row, top_k from 1 to V. values: maxima, [BLOCKS]."""
    lowest = tl.full((), LOWEST_KEY, tl.int64)
    highest = ordered_keys(best).to(tl.int64)
    none = tl.full((), 0, tl.int64)
    if top_k <= blocks:
        # It is no less than the k-th largest of some of them, those that are the largest of their block.
        keys = tl.where(tl.arange(0, BLOCKS) < blocks, ordered_keys(values), NO_KEY)
        least = tl.min(tl.where(keys > NO_KEY, keys, LARGEST_KEY), axis=0).to(tl.int64)
        lowest = halve(keys, least, highest, none, top_k, False)
    bound = float_of_key(lowest.to(tl.int32))
    key = find_threshold(
        row,
        vocab,
        maxima,
        blocks,
        listed,
        candidates,
        bound=bound,
        lowest=lowest,
        highest=highest,
        needed=top_k,
        share=1.0,
        best=best,
        inverse=1.0,
        least_logit=0.0,
        least_weight=0.0,
        MASS=False,
        BLOCKS=BLOCKS,
    )
    return float_of_key(key.to(tl.int32))


@triton.jit
def _winning_block(
    row, vocab, listed, number, sums, random, best, inverse, least_logit, least_weight, BLOCKS: tl.constexpr
):
    """Of the listed blocks, the one with the largest score. sums: [blocks] int64, room."""
    for first in range(0, number, TILE):
        _, x = load_listed(row, vocab, listed, first, number)
        weights = kept_weights(x, best, inverse, least_logit, least_weight).to(tl.int64)
        places = first + tl.arange(0, TILE)
        tl.store(sums + places, tl.sum(weights, axis=1), mask=places < number)
    tl.debug_barrier()
    places = tl.arange(0, BLOCKS)
    blocks = tl.load(listed + places, mask=places < number, other=0)
    sums_of_blocks = tl.load(sums + places, mask=places < number, other=0).to(tl.float64)
    return _first_winner(sums_of_blocks / exponentials(random, block_keys(blocks)), blocks)


@triton.jit
def _first_winner(scores, items):
    """Of the items with the largest score the smallest."""
    return tl.min(tl.where(scores == tl.max(scores, axis=0), items, LARGEST_KEY), axis=0)


@triton.jit
def _winning_token(row, vocab, block, random, best, inverse, least_logit, least_weight):
    tokens = block * RACE_BLOCK + tl.arange(0, RACE_BLOCK)
    x = finite(tl.load(row + tokens, mask=tokens < vocab, other=float("-inf")))
    weights = kept_weights(x, best, inverse, least_logit, least_weight)
    scores = weights.to(tl.float64) / exponentials(random, token_keys(tokens))
    return tl.minimum(_first_winner(scores, tokens), vocab - 1)


@triton.jit
def _sample(
    logits,  # [R, V], rows `stride` apart
    stride,
    vocab,  # V
    block_maxima,  # [R, blocks]
    blocks,
    listed,  # [R, blocks] int32, room
    candidates,  # [R, ROOM] int32, room
    sums,  # [R, blocks] int64, room
    temperature,  # [R]
    min_p,  # [R]
    top_k,  # [R]
    top_p,  # [R]
    seeds,  # [R]
    positions,  # [R]
    tokens,  # [R] out
    valid,  # [R] out
    FILTERED: tl.constexpr,  # top_k and top_p count; one without the other would run no more side by side
    BLOCKS: tl.constexpr,  # the power of two from `blocks` up
):
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * stride
    maxima = block_maxima + at * blocks
    listed += at * blocks
    candidates += at * ROOM
    sums += at * blocks
    numbers = tl.arange(0, BLOCKS)
    values = tl.load(maxima + numbers, mask=numbers < blocks, other=float("-inf"))
    best = tl.max(values, axis=0)
    tl.store(valid + at, best > float("-inf"))
    heat = tl.load(temperature + at)
    if (best == float("-inf")) | (heat < MIN_TEMPERATURE):
        tl.store(tokens + at, first_largest(row, vocab, values, best, BLOCKS).to(tl.int64))
        return

    inverse = LOG2_E / heat
    least_logit = float("-inf")
    least_weight = tl.maximum(tl.load(min_p + at) * WEIGHT_SCALE, 1.0)
    bound = logit_bound(least_weight, best, inverse)
    if FILTERED:
        k = tl.load(top_k + at)
        if (k > 0) & (k < vocab):
            least_logit = _kth_largest(
                row, vocab, maxima, blocks, listed, candidates, values, best, k, BLOCKS
            )
        bound = tl.maximum(bound, least_logit)
        share = tl.load(top_p + at)
        if share < 1.0:
            key = find_threshold(
                row,
                vocab,
                maxima,
                blocks,
                listed,
                candidates,
                bound=bound,
                lowest=tl.full((), BELOW_ONE_KEY, tl.int64),
                highest=tl.full((), WEIGHT_SCALE_KEY, tl.int64),
                needed=tl.full((), 0, tl.int64),
                share=share,
                best=best,
                inverse=inverse,
                least_logit=least_logit,
                least_weight=least_weight,
                MASS=True,
                BLOCKS=BLOCKS,
            )
            threshold = key.to(tl.int32).to(tl.float32, bitcast=True)
            least_weight = tl.maximum(least_weight, threshold)
            bound = tl.maximum(bound, logit_bound(least_weight, best, inverse))

    random = random_bits(tl.load(seeds + at), tl.load(positions + at))
    number = list_blocks(maxima, blocks, bound, listed, BLOCKS)
    block = _winning_block(
        row, vocab, listed, number, sums, random, best, inverse, least_logit, least_weight, BLOCKS
    )
    token = _winning_token(row, vocab, block, random, best, inverse, least_logit, least_weight)
    tl.store(tokens + at, token.to(tl.int64))


@triton.jit
def _greedy(
    logits,  # [R, V], rows `stride` apart
    stride,
    vocab,  # V
    block_maxima,  # [R, blocks]
    blocks,
    tokens,  # [R] out
    valid,  # [R] out
    BLOCKS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, BLOCKS)
    values = tl.load(block_maxima + at * blocks + numbers, mask=numbers < blocks, other=float("-inf"))
    best = tl.max(values, axis=0)
    tl.store(valid + at, best > float("-inf"))
    tl.store(tokens + at, first_largest(logits + at * stride, vocab, values, best, BLOCKS).to(tl.int64))


def sample_rows_launches(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    valid: torch.Tensor,
    *,
    filtered: bool = True,
) -> tuple[Launch, Launch]:
    """tokens: int64 [R], valid: bool [R], written. Otherwise as `sample_rows`."""
    check_logits(logits)
    check_vectors(
        logits,
        logits.shape[0],
        temperature=(temperature, torch.float32),
        min_p=(min_p, torch.float32),
        top_k=(top_k, torch.int64),
        top_p=(top_p, torch.float64),
        seeds=(seeds, torch.int64),
        positions=(positions, torch.int64),
        tokens=(tokens, torch.int64),
        valid=(valid, torch.bool),
    )
    rows, vocab = logits.shape
    blocks = number_of_blocks(vocab)
    maxima = logits.new_empty(rows, blocks)
    room = {
        "listed": torch.empty(rows, blocks, dtype=torch.int32, device=logits.device),
        "candidates": torch.empty(rows, ROOM.value, dtype=torch.int32, device=logits.device),
        "sums": torch.empty(rows, blocks, dtype=torch.int64, device=logits.device),
    }
    draw = Launch(
        _sample,
        (rows,),
        {
            "logits": logits,
            "stride": logits.stride(0),
            "vocab": vocab,
            "block_maxima": maxima,
            "blocks": blocks,
            **room,
            "temperature": temperature,
            "min_p": min_p,
            "top_k": top_k,
            "top_p": top_p,
            "seeds": seeds,
            "positions": positions,
            "tokens": tokens,
            "valid": valid,
            "FILTERED": filtered,
            "BLOCKS": padded_blocks(vocab),
        },
        num_warps=16,
        num_stages=1,
        # All there are for 512 threads: one program has a multiprocessor to itself.
        max_registers=128,
    )
    return block_maxima_launch(logits, maxima), draw


def greedy_rows_launches(
    logits: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor
) -> tuple[Launch, Launch]:
    """tokens: int64 [R], valid: bool [R], written. Otherwise as `greedy_rows`."""
    check_logits(logits)
    check_vectors(logits, logits.shape[0], tokens=(tokens, torch.int64), valid=(valid, torch.bool))
    rows, vocab = logits.shape
    blocks = number_of_blocks(vocab)
    maxima = logits.new_empty(rows, blocks)
    choose = Launch(
        _greedy,
        (rows,),
        {
            "logits": logits,
            "stride": logits.stride(0),
            "vocab": vocab,
            "block_maxima": maxima,
            "blocks": blocks,
            "tokens": tokens,
            "valid": valid,
            "BLOCKS": padded_blocks(vocab),
        },
        num_warps=4,
        num_stages=1,
    )
    return block_maxima_launch(logits, maxima), choose


def sample_rows(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    filtered: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row of logits: int64 [R], and bool [R], False where no logit was above -inf; such a
    row gets token 0.

    logits: float32 [R, V], rows any distance apart; NaN counts as -inf and +inf as the largest finite number.
    Of each row: temperature float32, greedy below MIN_TEMPERATURE; min_p float32, 0 for none; top_k int64, 0
    for all; top_p float64, 1 for all; seeds int64; positions int64, the index of the token in its sequence.
    filtered: False lets the kernel leave out top_k and top_p, which no row then asks for. Raises ValueError
    for what does not fit."""
    tokens, valid = _empty_results(logits)
    for launch in sample_rows_launches(
        logits,
        temperature,
        min_p,
        top_k,
        top_p,
        seeds,
        positions,
        tokens,
        valid,
        filtered=filtered,
    ):
        launch.run()
    return tokens, valid


def greedy_rows(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token with the largest logit of each row, as `sample_rows` of temperature 0."""
    tokens, valid = _empty_results(logits)
    for launch in greedy_rows_launches(logits, tokens, valid):
        launch.run()
    return tokens, valid


def _empty_results(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = logits.shape[:1]
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    return tokens, torch.empty(rows, dtype=torch.bool, device=logits.device)
