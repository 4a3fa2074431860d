"""The engine samples with the Triton kernels where they run, and gives what it gives without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY, SamplingParams
from chiron_engine.runtime import logit_adjustments, sampler, token_logprobs
from chiron_engine.runtime.logit_adjustments import AdjustmentTable
from chiron_engine.runtime.prompt_scores import PromptRows
from chiron_engine.runtime.sampler import SamplingTable, sample
from chiron_engine.runtime.token_logprobs import LogprobTable, logprobs_of

CPU = torch.device("cpu")
KINDS = [
    GREEDY,
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.2, top_k=40),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=0.9, min_p=0.05, top_k=900),
]


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch):
    """Call it to have CPU tensors go to the kernels; those of a GPU do without."""

    def use() -> None:
        for module in (sampler, token_logprobs):
            monkeypatch.setattr(module, "runs_triton", lambda device: True)

    return use


def some_logits(rows: int, vocab: int = 700) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * 2


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:1], KINDS[1:3]])
def test_sampling(kinds: list[SamplingParams], triton, device: torch.device) -> None:
    """Of greedy rows and others together, greedy ones alone, and others alone."""
    logits = some_logits(2 * len(kinds))
    table = SamplingTable(len(logits), logits.shape[1])
    for slot in range(len(logits)):
        table.set(slot, kinds[slot % len(kinds)], 1 << 63 | slot)
    slots, positions = np.arange(len(logits)), torch.arange(len(logits)) + 5
    expected = sample(logits, table.rows(slots, CPU), positions)
    triton()
    found = sample(logits.to(device), table.rows(slots, device), positions.to(device))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)


def test_logprobs_and_ranks(triton, device: torch.device) -> None:
    logits, tokens = some_logits(4), torch.tensor([3, 699, 0, 12])
    tables = [LogprobTable(4, where) for where in (CPU, device)]
    for slot, count in enumerate((2, None, 0, 5)):
        for table in tables:
            table.set(slot, count)
    of_host, of = (table.rows(np.arange(4)) for table in tables)
    assert of_host is not None and of is not None
    of_prompt = PromptRows(torch.arange(4), tokens, [1, 0, 3, 2], [(0, 4)])
    expected = logprobs_of(logits, tokens, of_host)
    expected_scores = of_prompt.scores(logits)
    triton()
    found = logprobs_of(logits.to(device), tokens.to(device), of)
    assert torch.equal(found.top_ids.cpu(), expected.top_ids)
    torch.testing.assert_close(found.chosen.cpu(), expected.chosen, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(found.top.cpu(), expected.top, rtol=1e-6, atol=5e-6)
    on_device = PromptRows(of_prompt.rows.to(device), tokens.to(device), of_prompt.counts, of_prompt.chunks)
    scores = on_device.scores(logits.to(device))
    assert torch.equal(scores.ranks.cpu(), expected_scores.ranks)
    assert torch.equal(scores.found.top_ids.cpu(), expected_scores.found.top_ids)


def test_adjustments(triton, device: torch.device) -> None:
    """Of a prompt, then of two tokens more; one row has all, one nothing, one a bias."""
    asks = [
        SamplingParams(
            logit_bias={3: 2.0, 7: -1.0}, min_tokens=2, repetition_penalty=1.5, presence_penalty=0.5
        ),
        SamplingParams(),
        SamplingParams(logit_bias={1: 100.0}, frequency_penalty=0.25),
    ]
    tables = [AdjustmentTable(3, 32, where) for where in (CPU, device)]
    for slot, ask in enumerate(asks):
        prompt = [slot, 4, 9, 4, 11]
        for table in tables:
            table.set(slot, Request(slot, prompt, ask, 30, frozenset({7, 9})), np.array(prompt))
    for step in range(3):
        logits, last = some_logits(3, 40), torch.tensor([8, 8, 8 + step])
        positions, decodes = torch.full((3,), 5 + step), 3 if step else 0
        rows, on_device = (table.rows(np.arange(3), decodes) for table in tables)
        assert rows is not None and on_device is not None
        changed = logits.to(device, copy=True)
        rows.apply(logits, positions, last, 8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logit_adjustments, "runs_triton", lambda device: True)
            on_device.apply(changed, positions.to(device), last.to(device), 8)
        assert torch.equal(changed.cpu(), logits)
