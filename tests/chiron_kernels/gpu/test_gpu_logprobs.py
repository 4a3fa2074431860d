"""Logarithms of probabilities, ranks and the likeliest tokens, by Triton kernels against float64."""

from __future__ import annotations

import math

import pytest
import torch
from chiron_kernels.gpu.logprobs import token_logprobs
from chiron_kernels.reference.logprobs import token_logprobs as reference_token_logprobs
from torch import Tensor


def exact(logits: Tensor, rows: Tensor, tokens: Tensor, few: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By a stable sort in float64: of equal logits the first comes first."""
    wide = logits[rows].double()
    shares = wide.log_softmax(-1)
    ids = wide.sort(dim=-1, descending=True, stable=True).indices[:, :few]
    chosen = tokens[rows].unsqueeze(1)
    ranks = (wide > wide.gather(1, chosen)).sum(-1) + 1
    return shares.gather(1, chosen).squeeze(1), ids, shares.gather(1, ids), ranks


def found(logits: Tensor, rows: Tensor, tokens: Tensor, few: int, device: torch.device) -> list[Tensor]:
    return [each.cpu() for each in token_logprobs(logits.to(device), rows.to(device), tokens.to(device), few)]


@pytest.mark.parametrize(("vocab", "few"), [(1, 1), (2, 0), (255, 20), (257, 20), (1000, 5), (5003, 20)])
def test_equals_float64(vocab: int, few: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, generator=generator) * 3
    logits[1] = logits[1].round()  # many ties, zeros of both signs among them
    logits[2, ::3] = -torch.inf
    logits[2, -1] = 30.0
    logits[4] += 1e4
    rows, tokens = torch.tensor([4, 0, 1, 2]), torch.randint(vocab, (5,), generator=generator)
    chosen, ids, likeliest, ranks = found(logits, rows, tokens, few, device)
    expected = exact(logits, rows, tokens, few)
    assert torch.equal(ids, expected[1])
    assert torch.equal(ranks, expected[3])
    torch.testing.assert_close(chosen.double(), expected[0], rtol=1e-6, atol=2e-3 if vocab > 1 else 0.0)
    # float32 holds the numbers near 1e4 of the first row in steps of 1e-3.
    torch.testing.assert_close(chosen[1:].double(), expected[0][1:], rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(likeliest[1:].double(), expected[2][1:], rtol=1e-6, atol=5e-6)


def test_equals_the_reference(device: torch.device) -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    rows, tokens = torch.arange(3), torch.tensor([5, 299, 0])
    for one, other in zip(
        found(logits, rows, tokens, 4, device), reference_token_logprobs(logits, rows, tokens, 4), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=5e-6)


def test_rows_that_are_broken_give_no_finite_numbers(device: torch.device) -> None:
    logits = torch.zeros(3, 600)
    logits[0, 5], logits[1, 5], logits[2] = math.nan, math.inf, -math.inf
    rows, tokens = torch.arange(3), torch.tensor([7, 7, 7])
    chosen, ids, likeliest, _ = found(logits, rows, tokens, 3, device)
    assert not chosen.isfinite().any()
    assert not likeliest.isfinite().any()
    assert ids.tolist() == [[0, 1, 2], [5, 0, 1], [0, 1, 2]]


def test_more_than_a_block_of_equal_ones(device: torch.device) -> None:
    """Those of the first block are taken out before the second one's, -inf though they are."""
    logits = torch.full((1, 300), -math.inf)
    logits[0, 270] = 0.0
    zero = torch.zeros(1, dtype=torch.int64)
    _, ids, likeliest, ranks = found(logits, zero, zero, 262, device)
    assert ids[0].tolist() == [270, *range(261)]
    assert likeliest[0].tolist() == [0.0, *[-math.inf] * 261]
    assert ranks.tolist() == [2]


def test_no_rows(device: torch.device) -> None:
    none = torch.empty(0, dtype=torch.int64)
    results = found(torch.zeros(2, 9), none, torch.zeros(2, dtype=torch.int64), 3, device)
    assert [list(each.shape) for each in results] == [[0], [0, 3], [0, 3], [0]]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("logits", lambda x: x.double(), "logits is float64; it must be float32"),
        ("logits", lambda x: x.T.contiguous().T, "logits has stride 4"),
        ("logits", lambda x: x[:0], r"logits has no rows"),
        ("rows", lambda x: x.int(), "rows is int32; it must be int64"),
        ("rows", lambda x: x[None], r"rows is \[1, 2\]; it must be \[any\]"),
        ("tokens", lambda x: x[:3], r"tokens is \[3\]; it must be \[4\]"),
        ("tokens", lambda x: x.to("meta"), "tokens is on meta"),
        ("few", lambda x: 10, "few is 10; it must be 0 to 9"),
        ("few", lambda x: -1, "few is -1; it must be 0 to 9"),
    ],
)
def test_bad_arguments_are_named(name: str, change, says: str, device: torch.device) -> None:
    arguments = {
        "logits": torch.zeros(4, 9, device=device),
        "rows": torch.tensor([0, 2], device=device),
        "tokens": torch.zeros(4, dtype=torch.int64, device=device),
        "few": 2,
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=says):
        token_logprobs(**arguments)
