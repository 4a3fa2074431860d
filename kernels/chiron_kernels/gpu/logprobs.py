"""How likely the model had chosen tokens, their ranks, and which tokens were the likeliest.

Two launches. The first reads the logits once, spread over many programs, and keeps of each block of tokens
its largest logit, the sum of its exponentials and how many of its logits are above the token's. In the second
each row is one program's: it adds these up and takes the likeliest out one by one, each from the block that
has it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.base_two import LN_2, LOG2_E
from chiron_kernels.gpu.checks import (
    check_contiguous,
    check_device,
    check_dtype,
    check_shape,
    check_vectors,
)
from chiron_kernels.gpu.launch import Launch
from chiron_kernels.gpu.logit_rows import (
    LARGEST_KEY,
    NO_KEY,
    RACE_BLOCK,
    check_logits,
    finite,
    float_of_key,
    load_blocks,
    number_of_blocks,
    ordered_keys,
    padded_blocks,
    tile_of_blocks,
)


@triton.jit
def _row_and_token(rows, tokens, height, vocab, at):
    """The row that entry `at` is about and its token, each kept inside the logits."""
    row = tl.minimum(tl.maximum(tl.load(rows + at), 0), height - 1)
    return row, tl.minimum(tl.maximum(tl.load(tokens + row), 0), vocab - 1)


@triton.jit(do_not_specialize=["height"], do_not_specialize_on_alignment=["rows", "tokens"])
def _block_summaries(
    logits,  # [R, V], rows `stride` apart
    stride,
    height,  # R
    vocab,  # V
    rows,  # [N]
    tokens,  # [R]
    maxima,  # [N, blocks] out
    sums,  # [N, blocks] out: of exp(logit - the largest of the block)
    larger,  # [N, blocks] int32 out: logits above that of the row's token
    blocks,
    TILE: tl.constexpr,  # blocks of one program
):
    at = tl.program_id(0).to(tl.int64)
    row, token = _row_and_token(rows, tokens, height, vocab, at)
    numbers = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = numbers < blocks
    x = load_blocks(logits + row * stride, vocab, numbers, inside)
    most = tl.max(finite(x), axis=1)
    # A block of nothing but -inf has the sum 0, and not that of NaN.
    shifted = x - tl.where(most == float("-inf"), 0.0, most)[:, None]
    places = at * blocks + numbers
    tl.store(maxima + places, most, mask=inside)
    tl.store(sums + places, tl.sum(tl.exp2(shifted * LOG2_E), axis=1), mask=inside)
    # In floats, which hold 256 exactly: the compiler packs a sum of flags into bytes of local memory.
    above = tl.where(x > tl.load(logits + row * stride + token), 1.0, 0.0)
    tl.store(larger + places, tl.sum(above, axis=1).to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["height", "few"], do_not_specialize_on_alignment=["rows", "tokens"])
def _likeliest(
    logits,  # [R, V], rows `stride` apart
    stride,
    height,  # R
    vocab,  # V
    rows,  # [N]
    tokens,  # [R]
    maxima,  # [N, blocks]
    sums,  # [N, blocks]
    larger,  # [N, blocks] int32
    blocks,
    few,  # K
    chosen,  # [N] out
    ids,  # [N, K] out
    likeliest,  # [N, K] out
    ranks,  # [N] out
    BLOCKS: tl.constexpr,  # the power of two from `blocks` up
):
    at = tl.program_id(0).to(tl.int64)
    row, token = _row_and_token(rows, tokens, height, vocab, at)
    row = logits + row * stride
    numbers = tl.arange(0, BLOCKS)
    inside = numbers < blocks
    places = at * blocks + numbers
    values = tl.load(maxima + places, mask=inside, other=float("-inf"))
    parts = tl.load(sums + places, mask=inside, other=0.0)
    best = tl.max(values, axis=0)
    total = best + tl.log2(tl.sum(parts * tl.exp2((values - best) * LOG2_E), axis=0)) * LN_2
    tl.store(chosen + at, tl.load(row + token) - total)
    tl.store(ranks + at, 1 + tl.sum(tl.load(larger + places, mask=inside, other=0).to(tl.int64), axis=0))

    keys = tl.where(inside, ordered_keys(values + 0.0), NO_KEY)  # -0.0 counts as 0.0
    last_key = tl.full((), LARGEST_KEY, tl.int32)
    last_id = tl.full((), -1, tl.int32)
    for place in range(0, few):
        # Invariant: keys are of the largest logit of each block behind (last_key, last_id) in the order.
        key = tl.max(keys, axis=0)
        block = tl.min(tl.where(keys == key, numbers, BLOCKS), axis=0)
        candidates = block * RACE_BLOCK + tl.arange(0, RACE_BLOCK)
        x = finite(tl.load(row + candidates, mask=candidates < vocab, other=float("-inf")))
        own = tl.where(candidates < vocab, ordered_keys(x + 0.0), NO_KEY)
        left = (own < last_key) | ((own == last_key) & (candidates > last_id))
        last_id = tl.min(tl.where(left & (own == key), candidates, vocab - 1), axis=0)
        last_key = key
        left = (own < key) | ((own == key) & (candidates > last_id))
        keys = tl.where(numbers == block, tl.max(tl.where(left, own, NO_KEY), axis=0), keys)
        tl.store(ids + at * few + place, last_id.to(tl.int64))
        tl.store(likeliest + at * few + place, float_of_key(key) - total)


def token_logprobs_launches(
    logits: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    few: int,
    chosen: torch.Tensor,
    ids: torch.Tensor,
    likeliest: torch.Tensor,
    ranks: torch.Tensor,
) -> tuple[Launch, Launch]:
    """chosen: float32 [N], ids: int64 [N, few], likeliest: float32 [N, few], ranks: int64 [N], written.
    Otherwise as `token_logprobs`."""
    check_logits(logits)
    height, vocab = logits.shape
    check_shape("rows", rows, (None,))
    count = rows.shape[0]
    if not 0 <= few <= vocab:
        raise ValueError(f"few is {few}; it must be 0 to {vocab}")
    if count and not height:
        raise ValueError("logits has no rows; it must have those that rows names")
    check_vectors(logits, height, tokens=(tokens, torch.int64))
    check_vectors(
        logits,
        count,
        rows=(rows, torch.int64),
        chosen=(chosen, torch.float32),
        ranks=(ranks, torch.int64),
    )
    for name, tensor, dtype in (("ids", ids, torch.int64), ("likeliest", likeliest, torch.float32)):
        check_shape(name, tensor, (count, few))
        check_dtype(name, tensor, (dtype,))
        check_contiguous(name, tensor)
        check_device(logits, **{name: tensor})
    blocks = number_of_blocks(vocab)
    summaries = {
        "logits": logits,
        "stride": logits.stride(0),
        "height": height,
        "vocab": vocab,
        "rows": rows,
        "tokens": tokens,
        "maxima": logits.new_empty(count, blocks),
        "sums": logits.new_empty(count, blocks),
        "larger": logits.new_empty(count, blocks, dtype=torch.int32),
        "blocks": blocks,
    }
    tile, warps = tile_of_blocks(count)
    summarise = Launch(
        _block_summaries,
        (count, -(-blocks // tile)),
        {**summaries, "TILE": tile},
        num_warps=warps,
        num_stages=1,
    )
    results = {"few": few, "chosen": chosen, "ids": ids, "likeliest": likeliest, "ranks": ranks}
    choose = Launch(
        _likeliest,
        (count,),
        {**summaries, **results, "BLOCKS": padded_blocks(vocab)},
        num_warps=4,
        num_stages=1,
    )
    return summarise, choose


def token_logprobs(
    logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, few: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logarithms of probabilities in the rows `rows` int64 [N] of logits float32 [R, V]: of the row's token,
    float32 [N]; ids int64 [N, few] and logarithms float32 [N, few] of the `few` likeliest, the likeliest
    first and of equal ones the first; and the ranks of the tokens, int64 [N], 1 for the likeliest.

    tokens: int64 [R]. A row with NaN or +inf, or of -inf alone, gives logarithms that are not finite. Numbers
    in rows and tokens that are out of range stand for the nearest that is not. Raises ValueError for what
    does not fit."""
    check_shape("rows", rows, (None,))
    count = rows.shape[0]
    chosen = torch.empty(count, dtype=torch.float32, device=logits.device)
    ids = torch.empty(count, max(few, 0), dtype=torch.int64, device=logits.device)
    likeliest = torch.empty(count, max(few, 0), dtype=torch.float32, device=logits.device)
    ranks = torch.empty(count, dtype=torch.int64, device=logits.device)
    for launch in token_logprobs_launches(logits, rows, tokens, few, chosen, ids, likeliest, ranks):
        launch.run()
    return chosen, ids, likeliest, ranks
