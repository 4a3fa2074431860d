"""From logits to tokens, compiled, against torch and against sorting; and what the kernels refuse."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from chiron_kernels.cpu.sampling import Draws, draw, forbid, row_maxima, token_logprobs

WIDTHS = [1, 5, 16, 17, 255, 256, 257, 1000, 49_152]
LARGEST = torch.finfo(torch.float32).max


def random_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def with_broken_rows(vocab: int) -> torch.Tensor:
    """Random ones, ties, nothing allowed, and what is not finite in some places or all."""
    logits = random_logits(9, vocab, seed=vocab)
    logits[1] = logits[1].round()
    logits[2] = -torch.inf
    logits[3] = torch.nan
    logits[4, ::3] = torch.nan
    logits[5, vocab // 2] = torch.inf
    logits[6, ::2] = -torch.inf
    logits[7, -1] = 100.0
    logits[8] = -5.0
    return logits


def draws_of(count: int, **asked: float) -> Draws:
    """The same for every row but for the seed."""
    fields = {"temperature": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 1.0, **asked}
    return Draws(
        torch.full((count,), fields["temperature"], dtype=torch.float32),
        torch.full((count,), fields["min_p"], dtype=torch.float32),
        torch.full((count,), int(fields["top_k"]), dtype=torch.int64),
        torch.full((count,), fields["top_p"], dtype=torch.float64),
        torch.arange(count) * 7919,
    )


def drawn(
    library: ctypes.CDLL,
    logits: torch.Tensor,
    positions: torch.Tensor,
    draws: Draws,
) -> torch.Tensor:
    best, tokens = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.int64)
    draw(library, logits, positions, None, draws, best, tokens)
    assert torch.equal(best, row_maxima(library, logits)[0])
    return tokens


@pytest.mark.parametrize("vocab", WIDTHS)
def test_the_first_of_the_largest_is_found(library: ctypes.CDLL, vocab: int) -> None:
    logits = with_broken_rows(vocab)
    finite = logits.nan_to_num(nan=-torch.inf, posinf=LARGEST, neginf=-torch.inf)
    best, tokens = row_maxima(library, logits)
    assert torch.equal(best, finite.amax(dim=-1))
    # Of equal ones `argmax` of numbers of 8 bits takes the first.
    assert torch.equal(tokens, (finite == best.unsqueeze(1)).to(torch.uint8).argmax(dim=-1))


def test_rows_may_lie_apart(library: ctypes.CDLL) -> None:
    wide = random_logits(6, 900)
    logits, rows, tokens = wide[:, 100:700], torch.arange(6), torch.arange(6)
    assert torch.equal(row_maxima(library, logits)[1], logits.argmax(-1))
    positions, draws = torch.arange(6), draws_of(6, top_p=0.9)
    apart = drawn(library, logits, positions, draws)
    assert torch.equal(apart, drawn(library, logits.contiguous(), positions, draws))
    found = token_logprobs(library, logits, rows, tokens, 3)[0]
    assert torch.equal(found, token_logprobs(library, logits.contiguous(), rows, tokens, 3)[0])
    before = wide.clone()
    forbid(library, logits, None, np.zeros((6, 19), np.int32))
    assert torch.isneginf(logits).all()
    assert torch.equal(wide[:, :100], before[:, :100]) and torch.equal(wide[:, 700:], before[:, 700:])


def kept_by_sorting(weights: list[float], top_k: int, top_p: float) -> set[int] | None:
    """Tokens that top-k, then top-p keep; None where rounding may move the cut of top-p."""
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k:
        order = [token for token in order if weights[token] >= weights[order[top_k - 1]]]
    needed, mass = top_p * math.fsum(weights[token] for token in order), 0.0
    for place, token in enumerate(order):
        mass += weights[token]
        if abs(mass - needed) < 1e-5 * needed and top_p < 1:
            return None
        if mass >= needed:
            return {each for each in order if weights[each] >= weights[order[place]]}
    return set(order)


def test_limits_keep_exactly_what_a_sort_keeps(library: ctypes.CDLL) -> None:
    """Of small vocabularies every token that may be drawn is, in so many draws."""
    generator, draws_each, tested = np.random.default_rng(5), 2000, 0
    for _ in range(60):
        vocab, temperature = int(generator.integers(1, 25)), float(generator.choice([0.5, 1.0, 3.0]))
        top_k, top_p = int(generator.integers(0, vocab + 1)), float(generator.choice([0.05, 0.4, 0.9, 1.0]))
        logits = generator.uniform(0, 2 * temperature, vocab)
        logits = np.round(logits, int(generator.integers(0, 3))).astype(np.float32)
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
        kept = kept_by_sorting(np.exp(scaled).tolist(), top_k, top_p)
        if kept is None:
            continue
        rows = torch.from_numpy(logits).expand(draws_each, -1)
        asked = draws_of(draws_each, temperature=temperature, top_k=top_k, top_p=top_p)
        assert set(drawn(library, rows, torch.arange(draws_each), asked).tolist()) == kept
        tested += 1
    assert tested > 40


def test_min_p_keeps_a_share_of_the_likeliest(library: ctypes.CDLL) -> None:
    logits = torch.tensor([0.5, 0.26, 0.24, 0.05]).log().expand(2000, -1)
    for min_p, kept in ((0.0, {0, 1, 2, 3}), (0.5, {0, 1}), (0.49, {0, 1}), (0.47, {0, 1, 2}), (1.0, {0})):
        found = drawn(library, logits, torch.arange(2000), draws_of(2000, min_p=min_p))
        assert set(found.tolist()) == kept


@pytest.mark.parametrize("vocab", WIDTHS)
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 1e-5},
        {"temperature": 1e6},
        {"top_p": 1e-12},
        {"top_p": 0.999999},
        {"top_k": 1},
        {"top_k": 1 << 31},
        {"min_p": 1.0},
        {"temperature": 0.7, "min_p": 0.01, "top_k": 200, "top_p": 0.95},
    ],
    ids=str,
)
def test_a_row_depends_on_itself_alone(library: ctypes.CDLL, vocab: int, asked: dict[str, float]) -> None:
    """Also with values that are not finite: what is drawn is allowed, or nothing is."""
    logits = torch.cat([with_broken_rows(vocab), random_logits(55, vocab, seed=1)])
    positions, draws = torch.arange(64) * 3, draws_of(64, **asked)
    together = drawn(library, logits, positions, draws)
    for row in (0, 1, 2, 3, 4, 5, 6, 7, 8, 40, 63):
        of_row = Draws(*(getattr(draws, name)[row : row + 1] for name in Draws.__slots__))
        alone = drawn(library, logits[row : row + 1], positions[row : row + 1], of_row)
        assert int(alone[0]) == int(together[row])
    best, likeliest = row_maxima(library, logits)
    has_some = best > -torch.inf
    assert (together[~has_some] == 0).all()
    chosen = logits.gather(1, together.unsqueeze(1)).squeeze(1)
    assert (chosen[has_some] > -torch.inf).all()
    if asked in ({"temperature": 1e-5}, {"top_p": 1e-12}, {"top_k": 1}, {"min_p": 1.0}):
        assert torch.equal(chosen.clamp(max=LARGEST)[has_some], best[has_some])
        assert int(together[7]) == int(likeliest[7])


def test_only_rows_that_are_asked_for_are_drawn(library: ctypes.CDLL) -> None:
    logits, positions, rows = random_logits(20, 700) * 0.1, torch.arange(20), torch.tensor([17, 3, 4, 0])
    maxima, likeliest = row_maxima(library, logits)
    best, tokens = torch.full((20,), 7.0), likeliest.clone()
    draw(library, logits, positions, rows, draws_of(4), best, tokens)
    assert torch.equal(tokens[rows], drawn(library, logits[rows], positions[rows], draws_of(4)))
    others = torch.ones(20, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(tokens[others], likeliest[others])
    assert torch.equal(best, maxima.where(~others, 7.0))
    draw(library, logits, positions, rows[:0], draws_of(0), best, tokens)


@pytest.mark.parametrize("vocab", [1, 32, 33, 65, 1000, 49_152])
def test_what_masks_forbid_is_taken_out(library: ctypes.CDLL, vocab: int) -> None:
    generator = np.random.default_rng(vocab)
    rows = torch.tensor([6, 0, 3])
    masks = generator.integers(-(2**31), 2**31, (8, -(-vocab // 32)), np.int64).astype(np.int32)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :vocab]
    forbidden = torch.from_numpy(bits == 0)
    logits = random_logits(8, vocab)
    logits[0, 0], logits[1, 0] = torch.inf, torch.nan
    some, every = logits.clone(), logits.clone()
    forbid(library, every, None, masks)
    assert torch.equal(every.nan_to_num(), logits.masked_fill(forbidden, -torch.inf).nan_to_num())
    forbid(library, some, rows, masks[:3])
    expected = logits.index_copy(0, rows, logits[rows].masked_fill(forbidden[:3], -torch.inf))
    assert torch.equal(some.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("vocab", WIDTHS)
@pytest.mark.parametrize("few", [0, 1, 5, 20])
def test_logprobs(library: ctypes.CDLL, vocab: int, few: int) -> None:
    logits = random_logits(12, vocab)
    logits[1] = logits[1].round()
    logits[2, 1:] = -torch.inf
    logits[3] = logits[3].sort().values
    logits[4] *= 1e30
    rows, few = torch.tensor([11, 0, 1, 2, 3, 4, 8]), min(few, vocab)
    tokens = torch.arange(12) % vocab
    chosen, ids, top = token_logprobs(library, logits, rows, tokens, few)
    expected = torch.log_softmax(logits[rows].double(), -1)
    torch.testing.assert_close(
        chosen.double(), expected.gather(1, tokens[rows].unsqueeze(1)).squeeze(1), rtol=1e-6, atol=2e-6
    )
    best = expected.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids, best.indices[:, :few])
    torch.testing.assert_close(top.double(), best.values[:, :few], rtol=1e-6, atol=2e-6)
    alone = token_logprobs(library, logits[:1], rows[1:2], tokens[:1], few)
    assert all(torch.equal(one[0], many[1]) for one, many in zip(alone, (chosen, ids, top), strict=True))


def test_logprobs_of_a_broken_row_are_not_finite(library: ctypes.CDLL) -> None:
    """The rows beside it stay as they are."""
    logits = random_logits(4, 300)
    logits[0, 7], logits[1], logits[2, 9] = torch.nan, -torch.inf, torch.inf
    chosen, ids, top = token_logprobs(library, logits, torch.arange(4), torch.zeros(4, dtype=torch.int64), 5)
    assert chosen.isfinite().tolist() == [False, False, False, True]
    assert top.isfinite().all(dim=1).tolist() == [False, False, False, True]
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 300 for row in ids.tolist())


WRONG_LOGITS = [
    (torch.zeros(4, 8, dtype=torch.float64), "logits is torch.float64"),
    (torch.zeros(8), "logits has shape"),
    (torch.zeros(4, 0), "logits has shape"),
    (torch.zeros(8, 4).T, "rows of logits are not contiguous"),
]


@pytest.mark.parametrize(("logits", "words"), WRONG_LOGITS, ids=lambda each: str(each)[:20])
def test_logits_that_are_refused(library: ctypes.CDLL, logits: torch.Tensor, words: str) -> None:
    rows = tokens = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        row_maxima(library, logits)
    with pytest.raises(ValueError, match=words):
        draw(library, logits, tokens, None, draws_of(4), torch.zeros(4), tokens)
    with pytest.raises(ValueError, match=words):
        forbid(library, logits, None, np.zeros((4, 1), np.int32))
    with pytest.raises(ValueError, match=words):
        token_logprobs(library, logits, rows, tokens, 1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"best": torch.zeros(4, dtype=torch.float64)}, "best is torch.float64"),
        ({"best": torch.zeros(3)}, r"best is torch.float32 \[3\]"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, "positions is torch.int32"),
        ({"positions": torch.arange(8)[::2]}, "positions is not contiguous"),
        ({"tokens": torch.zeros(4)}, "tokens is torch.float32"),
        ({"rows": torch.tensor([0, 1, 2, 4])}, "rows has values from 0 to 4; they must be 0 to 3"),
        ({"rows": torch.tensor([0, 1, 2, -1])}, "rows has values from -1"),
        ({"rows": torch.tensor([0, 1])}, r"temperature is torch.float32 \[4\]"),
        ({"temperature": torch.ones(4, dtype=torch.float64)}, "temperature is torch.float64"),
        ({"min_p": torch.ones(5)}, "min_p is"),
        ({"top_k": torch.ones(4)}, "top_k is"),
        ({"top_p": torch.ones(4)}, "top_p is"),
        ({"seeds": torch.ones(4)}, "seeds is"),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, dict) else "",
)
def test_draws_that_are_refused(library: ctypes.CDLL, changed: dict[str, torch.Tensor], words: str) -> None:
    given: dict[str, Any] = {
        "best": torch.zeros(4),
        "positions": torch.zeros(4, dtype=torch.int64),
        "rows": None,
        "tokens": torch.zeros(4, dtype=torch.int64),
        **{name: each for name, each in changed.items() if name not in Draws.__slots__},
    }
    of_draws = {name: each for name, each in changed.items() if name in Draws.__slots__}
    with pytest.raises(ValueError, match=words):
        draw(library, torch.zeros(4, 8), draws=replace(draws_of(4), **of_draws), **given)


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (np.zeros((4, 2), np.int64), "masks is int64"),
        (np.zeros((3, 2), np.int32), r"masks is int32 \[3, 2\]; it must be int32 \[4, 2\]"),
        (np.zeros((4, 1), np.int32), "masks is int32"),
        (np.zeros((2, 4), np.int32).T, "masks is not contiguous"),
    ],
)
def test_masks_that_are_refused(library: ctypes.CDLL, masks: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        forbid(library, torch.zeros(4, 40), None, masks)


def test_rows_that_overlap_are_not_written(library: ctypes.CDLL) -> None:
    with pytest.raises(ValueError, match="rows of logits overlap"):
        forbid(library, torch.zeros(1, 40).expand(4, -1), None, np.zeros((4, 2), np.int32))


@pytest.mark.parametrize(
    ("rows", "tokens", "few", "words"),
    [
        (torch.tensor([4]), torch.zeros(4, dtype=torch.int64), 1, "rows has values from 4"),
        (torch.tensor([0]), torch.tensor([0, 0, 0, 8]), 1, "tokens has values from 0 to 8"),
        (torch.tensor([0]), torch.zeros(3, dtype=torch.int64), 1, "tokens is"),
        (torch.tensor([0]), torch.zeros(4, dtype=torch.int64), 9, "few is 9; it must be 0 to 8"),
    ],
)
def test_logprobs_that_are_refused(
    library: ctypes.CDLL, rows: torch.Tensor, tokens: torch.Tensor, few: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        token_logprobs(library, torch.zeros(4, 8), rows, tokens, few)
