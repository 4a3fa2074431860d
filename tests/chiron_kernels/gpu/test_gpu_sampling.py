"""The Triton sampler: the CPU's random numbers bit for bit, and the CPU's tokens."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from chiron_kernels.gpu import counter_noise
from chiron_kernels.gpu.logit_rows import FEW_ROWS, WIDEST
from chiron_kernels.gpu.sampling import greedy_rows, sample_rows
from chiron_kernels.gpu.selection import CANDIDATES
from chiron_kernels.reference import counter_noise as reference_noise
from chiron_kernels.reference.sampling import greedy_rows as reference_greedy_rows
from chiron_kernels.reference.sampling import sample_rows as reference_sample_rows
from torch import Tensor

ITEMS = 64
CPU = torch.device("cpu")


@triton.jit
def _noise(seeds, positions, bits, by_token, by_block, COUNT: tl.constexpr):
    row = tl.program_id(0)
    random = counter_noise.random_bits(tl.load(seeds + row), tl.load(positions + row))
    items = tl.arange(0, COUNT)
    tl.store(bits + row, random.to(tl.int64, bitcast=True))
    of_tokens = counter_noise.exponentials(random, counter_noise.token_keys(items * 4001))
    tl.store(by_token + row * COUNT + items, of_tokens)
    of_blocks = counter_noise.exponentials(random, counter_noise.block_keys(items))
    tl.store(by_block + row * COUNT + items, of_blocks)


def test_noise_is_the_cpu_s(device: torch.device) -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 99, 7], device=device)
    positions = torch.tensor([0, 5, 2**40, 131_071, 1, 2, 3], device=device)
    bits = torch.empty_like(seeds)
    by_token, by_block = (
        torch.empty(len(seeds), ITEMS, dtype=torch.float64, device=device) for _ in range(2)
    )
    _noise[(len(seeds),)](seeds, positions, bits, by_token, by_block, ITEMS)
    expected_bits = reference_noise.random_bits(seeds.cpu(), positions.cpu())
    assert torch.equal(bits.cpu(), expected_bits)
    tokens, blocks = reference_noise.item_keys(ITEMS * 4001, 4001, CPU)
    for found, keys in ((by_token, tokens[::4001]), (by_block, blocks)):
        expected = reference_noise.exponentials(expected_bits, keys)
        # The uniform numbers are the same bits; a logarithm may differ in its last ones.
        torch.testing.assert_close(found.cpu(), expected, rtol=4e-16, atol=0.0)


def parameters(rows: int, device: torch.device, **given: object) -> dict[str, Tensor]:
    """Of rows that draw from all tokens, but for what is given: a value, or one for each row."""
    dtypes = {
        "temperature": torch.float32,
        "min_p": torch.float32,
        "top_k": torch.int64,
        "top_p": torch.float64,
        "seeds": torch.int64,
        "positions": torch.int64,
    }
    values = {"temperature": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 1.0, "seeds": 3, **given}
    values.setdefault("positions", list(range(rows)))
    return {
        name: torch.tensor(values[name], dtype=dtype, device=device).expand(rows).contiguous()
        for name, dtype in dtypes.items()
    }


def expected_tokens(logits: Tensor, of: dict[str, Tensor]) -> tuple[list[int], list[bool]]:
    tokens, valid = reference_sample_rows(logits.cpu(), *(each.cpu() for each in of.values()))
    return tokens.tolist(), valid.tolist()


def drawn(logits: Tensor, of: dict[str, Tensor], **flags: bool) -> tuple[list[int], list[bool]]:
    tokens, valid = sample_rows(logits, *of.values(), **flags)
    return tokens.tolist(), valid.tolist()


def some_logits(rows: int, vocab: int, generator: torch.Generator) -> Tensor:
    """Peaked and flat rows, with ties or none, some with broken tokens, one of nothing else."""
    logits = torch.randn(rows, vocab, generator=generator)
    logits *= torch.tensor([0.01, 1.0, 3.0, 10.0]).repeat(rows)[:rows, None]
    logits[::5] = logits[::5].round()
    for start, value in ((1, -torch.inf), (2, torch.nan), (6, torch.inf)):
        logits[start::7, start::9] = value
    logits[rows // 2] = -torch.inf
    return logits


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000, 5003])
def test_tokens_are_the_reference_s(vocab: int, device: torch.device) -> None:
    rows, generator = 24, torch.Generator().manual_seed(vocab)

    def pick(choices: list[float]) -> list[float]:
        return [choices[i] for i in torch.randint(len(choices), (rows,), generator=generator).tolist()]

    of = parameters(
        rows,
        device,
        temperature=pick([0.0, 1e-6, 2e-5, 0.3, 0.8, 1.0, 2.0, 100.0]),
        min_p=pick([0.0, 0.0, 0.05, 1.0]),
        top_k=[int(k) for k in pick([0, 0, 1, 5, 50, vocab - 1, vocab, vocab + 3])],
        top_p=pick([1.0, 1.0, 1e-9, 0.1, 0.5, 0.95, 0.9999]),
        seeds=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator).tolist(),
    )
    logits = some_logits(rows, vocab, generator)
    assert drawn(logits.to(device), of) == expected_tokens(logits, of)


@pytest.mark.parametrize("given", [{}, {"top_k": 4}, {"top_p": 0.7}])
def test_batches_that_ask_for_less_than_all(given: dict[str, float], device: torch.device) -> None:
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(1))
    of = parameters(6, device, **given)
    assert drawn(logits.to(device), of, filtered=bool(given)) == expected_tokens(logits, of)


@pytest.mark.parametrize(
    "given",
    [
        {"top_p": 0.999, "temperature": 3.0},
        {"top_k": 6000},
        {"top_k": 7000, "top_p": 0.97, "min_p": 1e-4},
    ],
)
def test_more_tokens_than_are_gathered(given: dict[str, float], device: torch.device) -> None:
    """Flat rows, so that the search for a threshold takes several passes."""
    vocab = 3 * CANDIDATES.value
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(4)) * 0.3
    logits[1] = logits[1].mul(8).round().div(8)  # many ties
    logits[2] = 0.5
    of = parameters(3, device, **given)
    assert drawn(logits.to(device), of) == expected_tokens(logits, of)


@pytest.mark.parametrize("given", [{"top_k": 40}, {"top_k": 200, "top_p": 0.9}, {"top_p": 0.9}])
def test_what_is_kept_is_exact_where_one_pass_leaves_many_candidates(
    given: dict[str, float], device: torch.device
) -> None:
    """More tokens lie between the cut and the largest than are gathered. Many draws from one row: a token
    beyond the cut is soon among them."""
    vocab, rows = 8951, 24
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(7)) * 1.5
    logits = logits.expand(rows, -1).contiguous()
    of = parameters(rows, device, seeds=list(range(rows)), **given)
    assert drawn(logits.to(device), of) == expected_tokens(logits, of)


def test_frequencies_follow_the_distribution(device: torch.device) -> None:
    """Chi-square against softmax within five standard deviations; two blocks, so that both races count."""
    count, vocab = 100, 260
    logits = torch.full((vocab,), -torch.inf)
    logits[[3, 70, 255, 257, 259]] = torch.tensor([0.0, 0.7, -0.3, 0.5, 0.2])
    tokens, _ = sample_rows(
        logits.to(device).expand(count, -1),
        *parameters(count, device, temperature=0.8).values(),
        filtered=False,
    )
    expected = torch.softmax(logits.double() / 0.8, -1) * count
    seen = torch.bincount(tokens.cpu(), minlength=vocab).double()
    assert seen[expected == 0].sum() == 0
    there = expected > 0
    free = int(there.sum()) - 1
    score = ((seen - expected)[there] ** 2 / expected[there]).sum()
    assert float(score) < free + 5 * math.sqrt(2 * free)


def test_ties_at_a_threshold_all_stay(device: torch.device) -> None:
    logits = torch.tensor([0.0, 5.0, 5.0, 5.0, 1.0], device=device).expand(12, -1)
    for given in ({"top_k": 1}, {"top_p": 0.2}, {"min_p": 1.0}):
        assert set(drawn(logits, parameters(12, device, **given))[0]) == {1, 2, 3}


def test_greedy_takes_the_first_of_equal_ones(device: torch.device) -> None:
    logits = some_logits(20, 1000, torch.Generator().manual_seed(9))
    logits[3, [700, 300, 299]] = 50.0
    expected = [each.tolist() for each in reference_greedy_rows(logits)]
    assert expected[0][3] == 299
    assert [each.tolist() for each in greedy_rows(logits.to(device))] == expected
    assert list(drawn(logits.to(device), parameters(20, device, temperature=0.0))) == expected


def test_values_that_are_not_finite(device: torch.device) -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor(
        [
            [nan, 1.0, nan, -inf, 9.0],
            [nan] * 5,
            [-inf] * 5,
            [1.0, inf, 2.0, nan, -inf],
            [-inf] * 3 + [0, -inf],
        ],
        device=device,
    )
    for given in ({}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.5}):
        for found in (
            drawn(logits, parameters(5, device, **given)),
            expected_tokens(logits, parameters(5, CPU)),
        ):
            tokens, valid = found
            assert valid == [True, False, False, True, True]
            assert tokens[0] in (1, 4)
            assert tokens[1:] == [0, 0, 1, 3]


def test_extreme_logits_and_temperatures(device: torch.device) -> None:
    logits = torch.tensor([[3e38, -3e38, 2.9e38], [1e-40, 0.0, -1e-40]], device=device)
    for temperature in (2e-5, 100.0, 1e30):
        of = parameters(2, device, temperature=temperature, top_p=0.9999)
        assert drawn(logits, of) == expected_tokens(logits, of)


def test_a_row_does_not_depend_on_its_batch_mates(device: torch.device) -> None:
    """Not even on how many programs the first pass takes, which follows from their number."""
    few, many = 3, FEW_ROWS + 1
    logits = torch.randn(many, 1100, generator=torch.Generator().manual_seed(6)).to(device)
    of = parameters(many, device, top_p=0.8, top_k=[30 * (row % 2) for row in range(many)])
    of["temperature"][few:] = 0.0  # these are quick
    together, _ = drawn(logits, of)
    alone, _ = drawn(logits[:few], {name: each[:few] for name, each in of.items()})
    assert together[:few] == alone


def test_rows_any_distance_apart_and_no_rows(device: torch.device) -> None:
    wide = torch.randn(4, 600, generator=torch.Generator().manual_seed(2)).to(device)
    logits, of = wide[:, 40:339], parameters(4, device, top_p=0.9)
    assert drawn(logits, of) == expected_tokens(logits, of)
    assert drawn(logits[:0], {name: each[:0] for name, each in of.items()}) == ([], [])
    assert greedy_rows(logits[:0])[0].shape == (0,)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("logits", lambda x: x.half(), "logits is float16; it must be float32"),
        ("logits", lambda x: x[0], r"logits is \[9\]; it must be \[any, any\]"),
        ("logits", lambda x: x[:, :0], "logits has rows of 0; they must be of 1 to"),
        ("logits", lambda x: x.new_empty(4, 1).expand(4, WIDEST + 1), "logits has stride 0 in its last"),
        ("logits", lambda x: x.new_empty(4, WIDEST + 1), "rows of 524289"),
        ("temperature", lambda x: x.double(), "temperature is float64; it must be float32"),
        ("min_p", lambda x: x[:3], r"min_p is \[3\]; it must be \[4\]"),
        ("top_k", lambda x: x.int(), "top_k is int32; it must be int64"),
        ("top_p", lambda x: x.float(), "top_p is float32; it must be float64"),
        ("seeds", lambda x: x.repeat_interleave(2)[::2], "seeds has strides"),
        ("positions", lambda x: x.to("meta"), "positions is on meta"),
    ],
)
def test_bad_arguments_are_named(name: str, change, says: str, device: torch.device) -> None:
    arguments = {"logits": torch.zeros(4, 9, device=device), **parameters(4, device)}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=says):
        sample_rows(**arguments)
