"""Compiled for the CPU, or with torch: both choose the same tokens and tell the same of them."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
import torch

from chiron_engine.model.cpu_kernels import kernels_for
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.runtime.sampler import SamplingTable, sample
from chiron_engine.runtime.token_logprobs import LogprobRows, logprobs_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kernels() -> ctypes.CDLL:
    found = kernels_for(CPU)
    if found is None:
        pytest.skip("no compiled kernels here")
    return found


def some_logits(rng: random.Random, rows: int, vocab: int) -> torch.Tensor:
    """Peaked or flat, with ties or none, with some tokens or all forbidden or broken."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rng.randrange(1 << 32)))
    logits *= rng.choice([0.1, 1.0, 3.0, 10.0])
    if rng.random() < 0.3:
        logits = logits.round()
    for value in (-torch.inf, torch.nan, torch.inf):
        if rng.random() < 0.2:
            some = rng.choice([2, 100])
            logits[:, rng.randrange(some) :: some] = value
    if rng.random() < 0.3:
        logits[rng.randrange(rows)] = -torch.inf
    return logits


def some_params(rng: random.Random, vocab: int) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 2e-5, 0.3, 0.8, 1.0, 1.0, 2.0, 100.0]),
        top_p=rng.choice([1.0, 1.0, 1e-9, 0.1, 0.5, 0.95, 0.9999]),
        top_k=rng.choice([0, 0, 1, 5, 50, vocab, vocab + 3]),
        min_p=rng.choice([0.0, 0.0, 0.05, 1.0]),
    )


@pytest.mark.parametrize("vocab", [1, 5, 256, 257, 1013, 4096, 49_152])
def test_tokens_are_the_same(vocab: int) -> None:
    """exp differs in its last bits, which moves one draw in millions."""
    rng, drawn, moved = random.Random(vocab), 0, 0
    for count in (1, 2, 5, 33, 64) * (1 if vocab > 10_000 else 8):
        logits, table = some_logits(rng, count, vocab), SamplingTable(count, vocab)
        for slot in range(count):
            table.set(slot, some_params(rng, vocab), rng.randrange(1 << 64))
        rows = table.rows(np.arange(count), CPU)
        positions = torch.tensor([rng.randrange(1 << 20) for _ in range(count)])
        tokens, valid = sample(logits, rows, positions, Kernels.COMPILED)
        expected, expected_valid = sample(logits, rows, positions, Kernels.TORCH)
        assert torch.equal(valid, expected_valid)
        drawn, moved = drawn + count, moved + int((tokens != expected).sum())
    assert moved <= 1, f"{moved} of {drawn}"


@pytest.mark.parametrize("vocab", [7, 300, 4099])
@pytest.mark.parametrize("counts", [[0, 0, 0], [5, 0, 20]])
def test_logprobs_are_the_same(vocab: int, counts: list[int]) -> None:
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab)) * 5
    tokens, rows = torch.arange(40) % vocab, [39, 2, 11]
    of = LogprobRows(rows, torch.tensor(rows), counts)
    found, expected = (
        logprobs_of(logits, tokens, of, kernels).by_row() for kernels in (Kernels.COMPILED, Kernels.TORCH)
    )
    assert list(found) == list(expected) == rows
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert one.top_ids == other.top_ids
        assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=5e-6)
        assert one.logprob == pytest.approx(other.logprob, abs=5e-6)
