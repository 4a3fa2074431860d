"""The states of the slots: what joins and grows reaches the device's copy of the tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chiron_engine.policy.iteration.plan import Grown, Joined, StepPlan
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY
from chiron_engine.runtime.slots import SlotStates


def joined(slot: int, blocks: list[int], tokens: int) -> Joined:
    ids = list(range(tokens))
    return Joined(slot, Request(slot, ids, GREEDY, 4), ids, 0, blocks)


def test_the_mirror_follows_the_host() -> None:
    """On a device the tables are a copy, brought up to date entry by entry. Here the copy is made on
    the CPU, so that its updates can be compared."""
    states = SlotStates(4, 6, 100, 96, torch.device("cpu"))
    mirror = states.device_tables = torch.zeros(4, 6, dtype=torch.int64)
    plans = [
        StepPlan(0, joined=[joined(2, [7, 8, 9], 12), joined(0, [1], 2)]),
        StepPlan(1, grown=[Grown(0, 1, 5), Grown(2, 3, 6)]),
        StepPlan(2, left=[2], joined=[joined(2, [4], 3)], grown=[Grown(0, 2, 3)]),
    ]
    for plan in plans:
        states.apply(plan)
        states._update_device(plan.joined, plan.grown)
        assert np.array_equal(mirror.numpy(), states.tables)
    assert states.tables[2].tolist() == [4, 0, 0, 0, 0, 0]
    assert states.tables[0].tolist() == [1, 5, 3, 0, 0, 0]


def test_known_tokens_are_those_of_the_last_to_join() -> None:
    states = SlotStates(2, 4, 100, 64, torch.device("cpu"))
    states.apply(StepPlan(0, joined=[joined(1, [0], 5)]))
    assert states.known_tokens(1, 2, 3).tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match=r"chunk \[3, 6\) of slot 1, which knows 5 tokens"):
        states.known_tokens(1, 3, 3)
    states.apply(StepPlan(1, left=[1], joined=[joined(1, [0], 2)]))
    assert states.known_tokens(1, 0, 2).tolist() == [0, 1]


def test_more_blocks_than_a_table_holds_are_refused() -> None:
    states = SlotStates(2, 2, 100, 32, torch.device("cpu"))
    with pytest.raises(ValueError, match="3 blocks; a table holds 2"):
        states.apply(StepPlan(0, joined=[joined(1, [0, 1, 2], 5)]))
