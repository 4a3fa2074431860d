"""What requests ask of their logits: single logits moved or banned, and penalties on tokens that were there
before.

A token may be in a request's history many times, but its logit is scaled once, lowered by the presence
penalty once and by the frequency penalty as often as it was put out. So a row's program goes through the
history in steps, with a barrier after each: all logits are read before any is written, then each time it
meets a token it writes what the token's first meeting would have written.

    history of a slot    | prompt ......... | outputs ........ | not known yet
                         0            output_from           position
    repetition             p p p p p p p p p  p p p p p p p p p
    frequency, presence                       o o o o o o o o o
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.checks import check_device, check_dtype, check_last_dense, check_shape, check_vectors
from chiron_kernels.gpu.launch import Launch

ENTRIES_TILE = 256
HISTORY_TILE = 2048


@triton.jit(
    do_not_specialize=["height", "entries"],
    do_not_specialize_on_alignment=["rows", "tokens", "until", "values", "positions"],
)
def _adjust(
    logits,  # [R, V], rows `stride` apart, changed
    stride,
    height,  # R
    vocab,  # V
    positions,  # [R]
    rows,  # [E]
    tokens,  # [E]
    values,  # [E]
    until,  # [E]
    entries,  # E
    TILE: tl.constexpr,
):
    entry = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = entry < entries
    row = tl.load(rows + entry, mask=there, other=-1)
    token = tl.load(tokens + entry, mask=there, other=-1)
    there &= (row >= 0) & (row < height) & (token >= 0) & (token < vocab)
    there &= tl.load(positions + row, mask=there, other=0) < tl.load(until + entry, mask=there, other=0)
    # Atomic: a token may be both moved and banned, by two threads.
    tl.atomic_add(
        logits + row * stride + token,
        tl.load(values + entry, mask=there, other=0.0),
        mask=there,
        sem="relaxed",
    )


@triton.jit
def _history_tile(tokens, first, start, end, vocab, TILE: tl.constexpr):
    """Tokens first, first + 1 .. of a history, their places in it, and which are from start to before end."""
    places = first + tl.arange(0, TILE)
    inside = (places >= start) & (places < end)
    ids = tl.load(tokens + places, mask=inside, other=-1)
    return ids, places, inside & (ids >= 0) & (ids < vocab)


@triton.jit(
    do_not_specialize=["height", "longest", "slots_number"],
    do_not_specialize_on_alignment=[
        "positions",
        "rows",
        "slots",
        "output_from",
        "repetition",
        "frequency",
        "presence",
    ],
)
def _penalise(
    logits,  # [R, V], rows `stride` apart, changed
    stride,
    height,  # R
    vocab,  # V
    history,  # [S, L] int32, rows `history_stride` apart
    history_stride,
    slots_number,  # S
    longest,  # no position that counts is larger
    positions,  # [R]
    rows,  # [P]
    slots,  # [P]
    output_from,  # [P]
    repetition,  # [P]
    frequency,  # [P]
    presence,  # [P]
    room,  # [P, longest] float32
    TILE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row, slot = tl.load(rows + at), tl.load(slots + at)
    if (row < 0) | (row >= height) | (slot < 0) | (slot >= slots_number):
        return
    end = tl.minimum(tl.load(positions + row), longest).to(tl.int32)
    output = tl.maximum(tl.load(output_from + at), 0).to(tl.int32)
    logits += row * stride
    tokens = history + slot * history_stride
    found = room + at * longest

    scale = tl.load(repetition + at)
    if scale != 1.0:
        for first in range(0, end, TILE):
            ids, places, known = _history_tile(tokens, first, 0, end, vocab, TILE)
            tl.store(found + places, tl.load(logits + ids, mask=known, other=0.0), mask=known)
        tl.debug_barrier()
        for first in range(0, end, TILE):
            ids, places, known = _history_tile(tokens, first, 0, end, vocab, TILE)
            x = tl.load(found + places, mask=known, other=0.0)
            tl.store(logits + ids, tl.where(x > 0.0, tl.div_rn(x, scale), x * scale), mask=known)
        tl.debug_barrier()
    each = tl.load(frequency + at)
    if each != 0.0:
        for first in range(output, end, TILE):
            ids, _, known = _history_tile(tokens, first, output, end, vocab, TILE)
            tl.atomic_add(logits + ids, -each, mask=known, sem="relaxed")
        tl.debug_barrier()
    once = tl.load(presence + at)
    if once != 0.0:
        for first in range(output, end, TILE):
            ids, places, known = _history_tile(tokens, first, output, end, vocab, TILE)
            # Past the first-level cache: atomics change the second.
            x = tl.load(logits + ids, mask=known, other=0.0, cache_modifier=".cg")
            tl.store(found + places, x, mask=known)
        tl.debug_barrier()
        for first in range(output, end, TILE):
            ids, places, known = _history_tile(tokens, first, output, end, vocab, TILE)
            tl.store(logits + ids, tl.load(found + places, mask=known, other=0.0) - once, mask=known)


def adjust_launch(
    logits: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    values: torch.Tensor,
    until: torch.Tensor,
) -> Launch:
    """As `adjust`."""
    _check_written(logits)
    check_shape("rows", rows, (None,))
    entries = rows.shape[0]
    height, vocab = logits.shape
    check_vectors(logits, height, positions=(positions, torch.int64))
    check_vectors(
        logits,
        entries,
        rows=(rows, torch.int64),
        tokens=(tokens, torch.int64),
        values=(values, torch.float32),
        until=(until, torch.int64),
    )
    return Launch(
        _adjust,
        (-(-entries // ENTRIES_TILE),),
        {
            "logits": logits,
            "stride": logits.stride(0),
            "height": height,
            "vocab": vocab,
            "positions": positions,
            "rows": rows,
            "tokens": tokens,
            "values": values,
            "until": until,
            "entries": entries,
            "TILE": ENTRIES_TILE,
        },
        num_stages=1,
    )


def penalise_launch(
    logits: torch.Tensor,
    history: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    output_from: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> Launch:
    """As `penalise`."""
    _check_written(logits)
    height, vocab = logits.shape
    check_shape("history", history, (None, None))
    check_dtype("history", history, (torch.int32,))
    check_last_dense("history", history)
    check_device(logits, history=history)
    check_shape("rows", rows, (None,))
    count, longest = rows.shape[0], history.shape[1]
    check_vectors(logits, height, positions=(positions, torch.int64))
    check_vectors(
        logits,
        count,
        rows=(rows, torch.int64),
        slots=(slots, torch.int64),
        output_from=(output_from, torch.int64),
        repetition=(repetition, torch.float32),
        frequency=(frequency, torch.float32),
        presence=(presence, torch.float32),
    )
    return Launch(
        _penalise,
        (count,),
        {
            "logits": logits,
            "stride": logits.stride(0),
            "height": height,
            "vocab": vocab,
            "history": history,
            "history_stride": history.stride(0),
            "slots_number": history.shape[0],
            "longest": longest,
            "positions": positions,
            "rows": rows,
            "slots": slots,
            "output_from": output_from,
            "repetition": repetition,
            "frequency": frequency,
            "presence": presence,
            "room": logits.new_empty(count, longest),
            "TILE": HISTORY_TILE,
        },
        num_warps=16,
        num_stages=1,
    )


def _check_written(logits: torch.Tensor) -> None:
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits, (torch.float32,))
    check_last_dense("logits", logits)
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(f"logits has rows {logits.stride(0)} apart; they are written and must not overlap")


def adjust(
    logits: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    values: torch.Tensor,
    until: torch.Tensor,
) -> None:
    """Add values float32 [E] to single logits, those of tokens int64 [E] in rows int64 [E], as long as the
    row's position is below until int64 [E]. A bias is added up to the largest int64; a ban adds -inf.

    logits: float32 [R, V], changed. positions: int64 [R]. Entries outside the logits do nothing. Raises
    ValueError for what does not fit."""
    adjust_launch(logits, positions, rows, tokens, values, until).run()


def penalise(
    logits: torch.Tensor,
    history: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    output_from: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> None:
    """Penalise the tokens of P rows' histories: a logit above 0 is divided by the repetition penalty, another
    is multiplied by it; of a token that was put out the frequency penalty is taken off as often as it was,
    then the presence penalty once.

    logits: float32 [R, V], changed. history: int32 [slots, longest], rows any distance apart; of a slot the
    tokens before its row's position are known, and those from output_from on were put out. positions: int64
    [R]. rows, slots, output_from: int64 [P], each row and slot there once. repetition, frequency, presence:
    float32 [P]. Rows, slots and tokens out of range do nothing. Raises ValueError for what does not fit."""
    penalise_launch(
        logits, history, positions, rows, slots, output_from, repetition, frequency, presence
    ).run()
