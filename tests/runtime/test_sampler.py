"""The sampler: known random numbers, exact filters, and rows that do not know of each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from chiron_kernels.reference.counter_noise import exponentials, item_keys, random_bits
from chiron_kernels.reference.sampling import RACE_BLOCK, threshold_by_bisection, threshold_by_sorting
from torch import Tensor

from chiron_engine.model.cpu_kernels import kernels_for
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.policy.iteration.sampling_params import GREEDY, SamplingParams
from chiron_engine.runtime import sampler
from chiron_engine.runtime.sampler import SamplingRows, SamplingTable, sample

CPU = torch.device("cpu")


@pytest.fixture(params=[Kernels.COMPILED, Kernels.TORCH], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two samplers has to pass."""
    monkeypatch.setattr(sampler, "best_kernels", lambda device: request.param)
    if request.param is Kernels.COMPILED and kernels_for(CPU) is None:
        pytest.skip("no compiled kernels here")


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


def test_greedy_is_argmax() -> None:
    logits = random_logits(5, 300)
    assert draw(logits, [GREEDY] * 5, [0] * 5, [3] * 5) == logits.argmax(-1).tolist()
    cold = SamplingParams(temperature=1e-9, top_p=0.3)
    assert draw(logits, [cold] * 5, [0] * 5, [3] * 5) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.9])
@pytest.mark.parametrize("vocab", [40, 700])
def test_frequencies_follow_the_distribution(temperature: float, vocab: int) -> None:
    """Chi-square of 20,000 draws against softmax, over positions of one seed and over seeds. With 700
    tokens both races count: there are three blocks."""
    count = 20_000
    logits = random_logits(1, vocab, scale=1.0)
    params = [SamplingParams(temperature=temperature)] * count
    expected = torch.softmax(logits[0].double() / temperature, -1) * count
    for seeds, positions in (([99] * count, range(count)), (range(count), [5] * count)):
        tokens = torch.tensor(draw(logits.expand(count, -1), params, list(seeds), list(positions)))
        seen = torch.bincount(tokens, minlength=vocab).double()
        assert chi_square_is_usual(seen, expected)


def chi_square_is_usual(seen: Tensor, expected: Tensor) -> bool:
    """Within five standard deviations; what is expected under ten times counts as one bin."""
    rare = expected < 10
    seen = torch.cat([seen[~rare], seen[rare].sum(0, keepdim=True)])
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)]).clamp(min=1e-9)
    free = len(expected) - 1
    return float(((seen - expected) ** 2 / expected).sum()) < free + 5 * math.sqrt(2 * free)


def test_draws_at_neighbouring_positions_are_independent() -> None:
    """Pairs of tokens of two positions, and of two seeds, occur as often as the product says."""
    count, vocab = 32_000, 8
    logits = random_logits(1, vocab, scale=0.5)
    params, odds = [SamplingParams()] * count, torch.softmax(logits[0].double(), -1)
    expected = (odds[:, None] * odds).flatten() * (count // 2)
    for seeds, positions in ((np.full(count, 3), np.arange(count)), (np.arange(count), np.full(count, 9))):
        tokens = torch.tensor(draw(logits.expand(count, -1), params, seeds.tolist(), positions.tolist()))
        seen = torch.bincount(tokens[::2] * vocab + tokens[1::2], minlength=vocab * vocab).double()
        assert chi_square_is_usual(seen, expected)


def margins(logits: Tensor, temperature: float, seeds: list[int], positions: list[int]) -> list[float]:
    """By how much, as a share, the winner of each row leads: the smaller lead of its two races."""
    bits = random_bits(torch.tensor(seeds), torch.tensor(positions))
    tokens, blocks = item_keys(-(-logits.shape[1] // RACE_BLOCK) * RACE_BLOCK, RACE_BLOCK, CPU)
    weights = torch.zeros(len(logits), len(tokens), dtype=torch.float64)
    weights[:, : logits.shape[1]] = torch.softmax(logits.double() / temperature, -1)
    by_block = weights.view(len(logits), -1, RACE_BLOCK)
    first = by_block.sum(-1) / exponentials(bits, blocks)
    inside = by_block / exponentials(bits, tokens).view(by_block.shape)
    inside = inside[torch.arange(len(logits)), first.argmax(-1)]
    leads = [race.topk(2).values for race in (first, inside)]
    return torch.minimum(*(1 - lead[:, 1] / lead[:, 0] for lead in leads)).tolist()


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.0])
def test_rounding_moves_a_draw_only_where_two_scores_are_close(temperature: float) -> None:
    """As on another engine, with the rows in another batch: what moves a logit by at most 1e-4 moves
    a score by the share 2e-4 / temperature."""
    count, vocab, moved = 3000, 1500, 1e-4
    logits = random_logits(count, vocab, seed=2)
    noise = (torch.rand(logits.shape, generator=torch.Generator().manual_seed(4)) - 0.5) * 2 * moved
    params = [SamplingParams(temperature=temperature)] * count
    seeds, positions = [11] * count, list(range(count))
    before = draw(logits, params, seeds, positions)
    after = draw(logits + noise, params, seeds, positions)
    lead = margins(logits, temperature, seeds, positions)
    close = [margin < 2.5 * moved / temperature for margin in lead]
    assert all(a == b or near for a, b, near in zip(before, after, close, strict=True))
    assert sum(close) < 0.01 * count


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
    sampled = [i for i, p in enumerate(params) if p is not GREEDY]
    assert [together[i] for i in sampled] == draw(
        logits[sampled], *([values[i] for i in sampled] for values in (params, seeds, positions))
    )
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
