"""The sampler: known random numbers, exact filters, and rows that do not know of each other."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from chiron_engine.policy.iteration.request import GREEDY, SamplingParams
from chiron_engine.runtime.sampler import (
    SamplingRows,
    SamplingTable,
    random_bits,
    sample,
    threshold_by_bisection,
    threshold_by_sorting,
    uniform,
)

CPU = torch.device("cpu")
MASK = (1 << 64) - 1


def rows_for(params: list[SamplingParams], seeds: list[int], vocab: int) -> SamplingRows:
    table = SamplingTable(len(params), vocab)
    for slot, (param, seed) in enumerate(zip(params, seeds, strict=True)):
        table.set(slot, param, seed)
    return table.rows(np.arange(len(params)), CPU)


def draw(logits: Tensor, params: list[SamplingParams], seeds: list[int], positions: list[int]) -> list[int]:
    rows = rows_for(params, seeds, logits.shape[1])
    return sample(logits, rows, torch.tensor(positions))[0].tolist()


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def splitmix64(state: int) -> int:
    """Steele, Lea and Flood 2014, in whole numbers: the output for a state already advanced."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_splitmix64_yields_its_published_numbers() -> None:
    golden = 0x9E3779B97F4A7C15
    outputs = [splitmix64(1234567 + golden * (i + 1)) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 1, 77, 131071])
def test_random_bits_equal_whole_number_arithmetic(seed: int, position: int) -> None:
    golden = 0x9E3779B97F4A7C15
    expected = splitmix64(splitmix64(seed + golden) + golden * (position + 1))
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    bits = random_bits(torch.tensor([signed]), torch.tensor([position]))
    assert int(bits[0]) & MASK == expected
    assert float(uniform(torch.tensor([signed]), torch.tensor([position]))[0]) == (expected >> 11) / 2**53


def test_uniform_is_uniform_over_positions_and_over_seeds() -> None:
    """Chi-square over 64 bins and lag-one correlation, for one seed and for one position."""
    count = 64_000
    many, one = torch.arange(count), torch.full((count,), 7)
    for numbers in (uniform(one, many), uniform(many, one)):
        assert float(numbers.min()) >= 0.0
        assert float(numbers.max()) < 1.0
        seen = torch.histc(numbers.float(), bins=64, min=0, max=1)
        chi_square = float(((seen - count / 64) ** 2 / (count / 64)).sum())
        assert chi_square < 63 + 5 * math.sqrt(2 * 63)
        centred = numbers - 0.5
        correlation = float((centred[1:] * centred[:-1]).mean() * 12)
        assert abs(correlation) < 5 / math.sqrt(count)


def test_greedy_is_argmax() -> None:
    logits = random_logits(5, 300)
    assert draw(logits, [GREEDY] * 5, [0] * 5, [3] * 5) == logits.argmax(-1).tolist()
    cold = SamplingParams(temperature=1e-9, top_p=0.3)
    assert draw(logits, [cold] * 5, [0] * 5, [3] * 5) == logits.argmax(-1).tolist()


def test_frequencies_follow_the_distribution() -> None:
    """20,000 draws at one temperature: every token within five standard deviations."""
    count, vocab = 20_000, 40
    logits = random_logits(1, vocab, scale=1.0)
    params, temperature = SamplingParams(temperature=0.7), 0.7
    tokens = draw(logits.expand(count, -1), [params] * count, [99] * count, list(range(count)))
    expected = torch.softmax(logits[0].double() / temperature, -1).tolist()
    seen = Counter(tokens)
    for token, probability in enumerate(expected):
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(seen[token] - count * probability) < 5 * deviation + 1


def reference_kept(logits: Tensor, params: SamplingParams) -> set[int]:
    """Temperature, then top-k, then top-p, by a plain sort."""
    scaled = (logits.double() / params.temperature).tolist()
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = order[: params.top_k] if params.top_k else order
    weights = [math.exp(scaled[i] - scaled[order[0]]) for i in kept]
    total, mass, nucleus = sum(weights), 0.0, set()
    for token, weight in zip(kept, weights, strict=True):
        nucleus.add(token)
        mass += weight
        if mass >= params.top_p * total:
            break
    return nucleus


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=2.0, top_k=7),
        SamplingParams(temperature=1.0, top_p=0.01),
        SamplingParams(temperature=1.5, top_p=0.6),
        SamplingParams(temperature=0.8, top_k=12, top_p=0.8),
        SamplingParams(temperature=3.0, top_p=0.99),
    ],
)
def test_filters_keep_what_a_sort_keeps(params: SamplingParams) -> None:
    logits = random_logits(1, 150, seed=5)
    count = 3000
    tokens = set(draw(logits.expand(count, -1), [params] * count, [1] * count, list(range(count))))
    kept = reference_kept(logits[0], params)
    assert tokens <= kept
    likely = torch.softmax(logits[0] / params.temperature, -1)
    assert {t for t in kept if float(likely[t]) > 0.01} <= tokens


def test_ties_at_a_threshold_all_stay() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 5.0, 1.0]]).expand(400, -1)
    for params in (SamplingParams(top_k=1), SamplingParams(top_p=0.2)):
        assert set(draw(logits, [params] * 400, [3] * 400, list(range(400)))) == {1, 2, 3}


ALL_KINDS = [
    GREEDY,
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.2, top_k=40),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=5.0, top_k=500, top_p=0.999),
    SamplingParams(temperature=100.0, top_p=0.9999),
]


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    count, vocab = 48, 1013
    logits = random_logits(count, vocab, seed=8)
    params = [ALL_KINDS[i % len(ALL_KINDS)] for i in range(count)]
    seeds, positions = [i * 7919 for i in range(count)], [i * 3 for i in range(count)]
    together = draw(logits, params, seeds, positions)
    alone = [
        draw(logits[i : i + 1], params[i : i + 1], seeds[i : i + 1], positions[i : i + 1])[0]
        for i in range(count)
    ]
    assert together == alone
    reverse = draw(logits.flip(0), params[::-1], seeds[::-1], positions[::-1])
    assert reverse[::-1] == together


def test_both_ways_to_the_top_p_threshold_agree() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.floor(torch.rand(40, 2048, generator=generator) ** 8 * 2**32)
    weights[:4] = torch.floor(weights[:4] / 2**28)  # many ties
    weights[4] = 5.0
    share = torch.rand(40, 1, generator=generator, dtype=torch.float64)
    needed = weights.sum(-1, keepdim=True, dtype=torch.float64) * share
    assert torch.equal(threshold_by_sorting(weights, needed), threshold_by_bisection(weights, needed))


@pytest.mark.parametrize("params", ALL_KINDS)
def test_values_that_are_not_finite(params: SamplingParams) -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor(
        [
            [nan, 1.0, nan, -inf, 9.0],
            [nan, nan, nan, nan, nan],
            [-inf, -inf, -inf, -inf, -inf],
            [1.0, inf, 2.0, nan, -inf],
            [-inf, -inf, -inf, 0.0, -inf],
        ]
    )
    rows = rows_for([params] * 5, [1] * 5, 5)
    tokens, valid = sample(logits, rows, torch.arange(5))
    assert valid.tolist() == [True, False, False, True, True]
    assert int(tokens[0]) in (1, 4)
    assert tokens[1:].tolist() == [0, 0, 1, 3]


def test_extreme_logits_and_temperatures() -> None:
    logits = torch.tensor([[3e38, -3e38, 2.9e38], [1e-40, 0.0, -1e-40]])
    hot, cold = SamplingParams(temperature=100.0), SamplingParams(temperature=2e-5)
    assert draw(logits, [cold, cold], [1, 1], [0, 0])[0] == 0
    assert draw(logits, [hot, hot], [1, 1], [0, 0])[0] == 0
    many = draw(logits[1:].expand(200, -1), [hot] * 200, [1] * 200, list(range(200)))
    assert set(many) == {0, 1, 2}


def test_draws_repeat_by_seed_and_position_alone() -> None:
    logits = random_logits(1, 500, scale=0.5)
    params = [SamplingParams(temperature=1.0)]
    at = {(s, p): draw(logits, params, [s], [p])[0] for s in range(4) for p in range(50)}
    again = {(s, p): draw(logits, params, [s], [p])[0] for s in range(4) for p in range(50)}
    assert at == again
    assert len(set(at.values())) > 50


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    rows = rows_for([SamplingParams(top_k=10_000)], [0], 50)
    assert rows.largest_top_k == 0
