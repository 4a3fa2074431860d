"""The engine samples with the Triton kernels where they run, and gives what it gives without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY, SamplingParams
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


def some_logits(rows: int, vocab: int = 700) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * 2


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:1], KINDS[1:3]])
def test_sampling(kinds: list[SamplingParams], device: torch.device) -> None:
    """Of greedy rows and others together, greedy ones alone, and others alone."""
    logits = some_logits(2 * len(kinds))
    tables = [SamplingTable(len(logits), logits.shape[1], every_row) for every_row in (False, True)]
    for slot in range(len(logits)):
        for table in tables:
            table.set(slot, kinds[slot % len(kinds)], 1 << 63 | slot)
    slots, positions = np.arange(len(logits)), torch.arange(len(logits)) + 5
    expected = sample(logits, tables[0].rows(slots, CPU), positions)
    on_device = tables[1].rows(slots, device)
    found = sample(logits.to(device), on_device, positions.to(device), Kernels.TRITON)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)


def test_logprobs_and_ranks(device: torch.device) -> None:
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
    found = logprobs_of(logits.to(device), tokens.to(device), of, Kernels.TRITON)
    assert torch.equal(found.top_ids.cpu(), expected.top_ids)
    torch.testing.assert_close(found.chosen.cpu(), expected.chosen, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(found.top.cpu(), expected.top, rtol=1e-6, atol=5e-6)
    on_device = PromptRows(of_prompt.rows.to(device), tokens.to(device), of_prompt.counts, of_prompt.chunks)
    scores = on_device.scores(logits.to(device), Kernels.TRITON)
    assert torch.equal(scores.ranks.cpu(), expected_scores.ranks)
    assert torch.equal(scores.found.top_ids.cpu(), expected_scores.found.top_ids)


def test_adjustments(device: torch.device) -> None:
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
        on_device.apply(changed, positions.to(device), last.to(device), 8, Kernels.TRITON)
        assert torch.equal(changed.cpu(), logits)
