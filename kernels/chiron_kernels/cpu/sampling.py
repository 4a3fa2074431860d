"""From rows of logits to tokens: source/sampling.c.

Logits are float32 [rows, vocab] on the CPU; rows may lie any distance apart, and each is contiguous. A
dtype, a shape or a row number that does not fit raises ValueError, which names the argument, before anything
is computed; the values of what is asked are the caller's to check. The result of a row depends on that row
alone, bit for bit.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Draws:
    """What is asked of N draws, each [N] and contiguous: temperature float32, above 0; min_p float32;
    top_k int64, 0 for all; top_p float64; seeds int64."""

    temperature: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seeds: torch.Tensor


def row_maxima(library: ctypes.CDLL, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row, float32 [rows], and the first token that has it, int64 [rows]. NaN
    counts as -inf and +inf as the largest finite number; where all are -inf it is token 0."""
    rows, vocab = _check_logits(logits)
    best = torch.empty(rows, dtype=torch.float32)
    tokens = torch.empty(rows, dtype=torch.int64)
    library.chiron_row_maxima(
        logits.data_ptr(), rows, logits.stride(0), vocab, best.data_ptr(), tokens.data_ptr()
    )
    return best, tokens


def draw(
    library: ctypes.CDLL,
    logits: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor | None,
    draws: Draws,
    best: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Draw a token for each of the rows `rows` int64 [N], each there once, or for all where that is None.

    positions: int64 [rows of logits], of the token to draw in its sequence. Writes, for these rows, the
    largest logit into `best` float32 [rows of logits], as `row_maxima` has it, and the token into `tokens`
    int64 [rows of logits]: 0 where all logits are -inf.
    """
    number, vocab = _check_logits(logits)
    _check("best", best, torch.float32, number)
    _check("positions", positions, torch.int64, number)
    _check("tokens", tokens, torch.int64, number)
    count = _check_rows(rows, number)
    for name, dtype in (("temperature", torch.float32), ("min_p", torch.float32), ("top_k", torch.int64)):
        _check(name, getattr(draws, name), dtype, count)
    _check("top_p", draws.top_p, torch.float64, count)
    _check("seeds", draws.seeds, torch.int64, count)
    if not count:
        return
    # All or one: OpenMP ends the threads that a smaller team leaves out, and starts them again.
    threads = torch.get_num_threads() if count > 1 else 1
    room = torch.empty(threads, library.chiron_draw_room(vocab), dtype=torch.float32)
    library.chiron_draw(
        logits.data_ptr(),
        logits.stride(0),
        vocab,
        positions.data_ptr(),
        None if rows is None else rows.data_ptr(),
        count,
        draws.temperature.data_ptr(),
        draws.min_p.data_ptr(),
        draws.top_k.data_ptr(),
        draws.top_p.data_ptr(),
        draws.seeds.data_ptr(),
        best.data_ptr(),
        tokens.data_ptr(),
        room.data_ptr(),
        threads,
    )


def forbid(library: ctypes.CDLL, logits: torch.Tensor, rows: torch.Tensor | None, masks: np.ndarray) -> None:
    """Set logits to -inf in place where the bit of `masks` int32 [N, words] is 0: of the rows `rows`
    int64 [N], each there once, or of all where that is None. Bits of a word: the lowest is first."""
    number, vocab = _check_logits(logits)
    if number > 1 and logits.stride(0) < vocab:
        raise ValueError("rows of logits overlap; they are to be written")
    count, words = _check_rows(rows, number), -(-vocab // WORD_BITS)
    if masks.dtype != np.int32 or masks.shape != (count, words):
        raise ValueError(f"masks is {masks.dtype} {list(masks.shape)}; it must be int32 [{count}, {words}]")
    if not masks.flags.c_contiguous:
        raise ValueError("masks is not contiguous")
    where = None if rows is None else rows.data_ptr()
    library.chiron_forbid(
        logits.data_ptr(), logits.stride(0), vocab, where, count, masks.ctypes.data, 2 * words
    )


def token_logprobs(
    library: ctypes.CDLL, logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, few: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logarithms of probabilities in the rows `rows` int64 [N]: of the row's token, float32 [N], and of the
    `few` likeliest, int64 ids and float32 [N, few], the likeliest first and of equal ones the first.

    tokens: int64 [rows of logits]. A row with NaN or +inf gives values that are not finite.
    """
    number, vocab = _check_logits(logits)
    _check("tokens", tokens, torch.int64, number)
    _check_range("tokens", tokens, vocab)
    count = _check_rows(rows, number)
    if not 0 <= few <= vocab:
        raise ValueError(f"few is {few}; it must be 0 to {vocab}")
    found = max(few, 1)  # the largest logit is needed in any case
    chosen = torch.empty(count, dtype=torch.float32)
    ids = torch.empty(count, found, dtype=torch.int64)
    likeliest = torch.empty(count, found, dtype=torch.float32)
    library.chiron_token_logprobs(
        logits.data_ptr(),
        logits.stride(0),
        vocab,
        rows.data_ptr(),
        count,
        tokens.data_ptr(),
        found,
        chosen.data_ptr(),
        ids.data_ptr(),
        likeliest.data_ptr(),
    )
    return chosen, ids[:, :few], likeliest[:, :few]


def _check_logits(logits: torch.Tensor) -> tuple[int, int]:
    """Rows and tokens."""
    if logits.dtype != torch.float32 or logits.device.type != "cpu":
        raise ValueError(f"logits is {logits.dtype} on {logits.device}; it must be float32 on the CPU")
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [rows, vocab]")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError("rows of logits are not contiguous")
    return logits.shape[0], logits.shape[1]


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, count: int) -> None:
    if tensor.dtype != dtype or tensor.device.type != "cpu" or tensor.shape != (count,):
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
            f"it must be {dtype} [{count}] on the CPU"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")


def _check_rows(rows: torch.Tensor | None, number: int) -> int:
    """How many rows are meant, out of `number`."""
    if rows is None:
        return number
    _check("rows", rows, torch.int64, rows.numel())
    _check_range("rows", rows, number)
    return len(rows)


def _check_range(name: str, tensor: torch.Tensor, end: int) -> None:
    values = tensor.numpy()
    if values.size and (values.min() < 0 or values.max() >= end):
        raise ValueError(
            f"{name} has values from {values.min()} to {values.max()}; they must be 0 to {end - 1}"
        )
