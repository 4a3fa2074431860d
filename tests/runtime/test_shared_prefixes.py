"""Finding requests that begin with the same blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron_engine.runtime.shared_prefixes import (
    LEAST_BYTES,
    LEAST_TOKENS,
    CascadeRule,
    PrefixFinder,
    PrefixGroup,
    cascade_rule,
)

BLOCK = 4
CPU = torch.device("cpu")

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
"""tables, slots, lens."""


@st.composite
def batches(draw: st.DrawFn, most: int = 6) -> Batch:
    """Tables of a few block numbers, so that many agree, in any order and length."""
    count, width = draw(st.integers(0, most)), draw(st.integers(1, 5))
    tables = np.array(
        draw(st.lists(st.lists(st.integers(1, 2), min_size=width, max_size=width), min_size=7, max_size=7)),
        np.int64,
    )
    slots = np.array(draw(st.permutations(range(7)))[:count], np.int64)
    lens = draw(st.lists(st.integers(1, width * BLOCK), min_size=count, max_size=count))
    return tables, slots, np.array(lens, np.int64)


RULES = st.builds(CascadeRule, st.integers(1, 12), st.integers(0, 5), st.integers(1, 30))


def common_blocks(batch: Batch, members: Sequence[int]) -> int:
    """That all of them begin with, one by one."""
    tables, slots, lens = batch
    most = min((int(lens[member]) - 1) // BLOCK for member in members)
    rows = [tables[slots[member]].tolist() for member in members]
    return next((index for index in range(most) if len({row[index] for row in rows}) > 1), most)


def partitions(members: list[int]) -> Iterator[list[list[int]]]:
    if not members:
        yield []
        return
    for rest in partitions(members[1:]):
        yield [[members[0]], *rest]
        for index, part in enumerate(rest):
            yield [*rest[:index], [members[0], *part], *rest[index + 1 :]]


def most_saved(batch: Batch, rule: CascadeRule, whole_groups: bool) -> int:
    """By the best of all ways to make groups; or of those of whole groups: all requests with some prefix."""

    def saved(part: list[int]) -> int:
        blocks = common_blocks(batch, part)
        if not blocks or blocks * BLOCK < rule.least_tokens:
            return 0
        others = set(range(len(batch[1]))) - set(part)
        if whole_groups and any(common_blocks(batch, [*part, other]) == blocks for other in others):
            return 0
        return max(rule.saved(len(part), blocks * BLOCK), 0)

    return max(sum(map(saved, parts)) for parts in partitions(list(range(len(batch[1])))))


def saved_by(groups: Sequence[PrefixGroup], rule: CascadeRule) -> int:
    return sum(rule.saved(len(group.members), group.blocks * BLOCK) for group in groups)


@settings(max_examples=300, deadline=None)
@given(batches(), RULES)
def test_groups_share_what_is_said_and_are_worth_it(batch: Batch, rule: CascadeRule) -> None:
    groups = PrefixFinder(rule, BLOCK).groups(*batch)
    members = [member for group in groups for member in group.members]
    assert len(members) == len(set(members))
    for group in groups:
        assert group.blocks == common_blocks(batch, group.members)
        assert group.blocks * BLOCK >= rule.least_tokens
        assert rule.saved(len(group.members), group.blocks * BLOCK) > 0
    if groups:
        assert rule.least_saved <= saved_by(groups, rule) <= most_saved(batch, rule, whole_groups=False)


@settings(max_examples=300, deadline=None)
@given(batches(), RULES)
def test_at_least_what_whole_groups_save(batch: Batch, rule: CascadeRule) -> None:
    groups = PrefixFinder(rule, BLOCK).groups(*batch)
    best = most_saved(batch, rule, whole_groups=True)
    if best >= rule.least_saved:
        assert saved_by(groups, rule) >= best


@settings(max_examples=100, deadline=None)
@given(batches())
def test_what_the_device_is_given(batch: Batch) -> None:
    tables, slots, lens = batch
    finder = PrefixFinder(CascadeRule(1), BLOCK)
    groups, shared = finder.groups(*batch), finder.shared_prefixes(*batch, CPU)
    if shared is None:
        assert not groups
        return
    starts, members = shared.starts.tolist(), shared.members.tolist()
    assert starts[0] == 0 and starts[-1] == len(members)
    found = [members[start:end] for start, end in pairwise(starts)]
    assert found == [sorted(group.members) for group in groups]
    assert shared.lens.tolist() == [group.blocks * BLOCK for group in groups]
    assert shared.longest == shared.lens.max()
    assert shared.everyone == (members == list(range(len(slots))))
    skipped = shared.skipped.tolist()
    for row, of_group, length in zip(shared.table_rows.tolist(), found, shared.lens.tolist(), strict=True):
        blocks = length // BLOCK
        for member in of_group:
            assert (tables[slots[member], :blocks] == tables[row, :blocks]).all()
            assert skipped[member] == length < lens[member]
    assert all(skipped[request] == 0 for request in set(range(len(slots))) - set(members))


def prompts(*blocks: Sequence[int], width: int = 64) -> Batch:
    """Requests in slots of the same number with these whole blocks, and a token in one of their own."""
    tables = np.zeros((len(blocks), width), np.int64)
    for slot, of_request in enumerate(blocks):
        tables[slot, : len(of_request) + 1] = [*of_request, 1000 + slot]
    lens = np.array([len(of_request) * BLOCK + 1 for of_request in blocks], np.int64)
    return tables, np.arange(len(blocks)), lens


def test_several_groups_in_one_batch() -> None:
    batch = prompts([1, 2, 3], [7, 8], [1, 2, 4], [9], [7, 8, 5], [1, 2, 6])
    groups = PrefixFinder(CascadeRule(BLOCK), BLOCK).groups(*batch)
    assert sorted((sorted(group.members), group.blocks) for group in groups) == [([0, 2, 5], 2), ([1, 4], 2)]


def test_few_with_a_long_prefix_among_many_with_a_short_one() -> None:
    system, document = [1], list(range(2, 22))
    batch = prompts(*([*system, 30 + number] for number in range(5)), *([*system, *document] for _ in "ab"))
    groups = PrefixFinder(CascadeRule(BLOCK), BLOCK).groups(*batch)
    assert sorted((sorted(group.members), group.blocks) for group in groups) == [
        ([0, 1, 2, 3, 4], 1),
        ([5, 6], 21),
    ]
    short = [2, 3]
    batch = prompts(*([*system, 30 + number] for number in range(5)), *([*system, *short] for _ in "ab"))
    # Apart, 2 requests save as much by their 3 blocks as they would by 1 block with the 5 others, and a bit.
    rule = CascadeRule(BLOCK)
    assert saved_by(PrefixFinder(rule, BLOCK).groups(*batch), rule) == (4 + 3) * BLOCK


def test_the_newest_token_is_never_in_a_prefix() -> None:
    """Were a table's last block full of the newest token and shared, nothing would be left of the request."""
    tables = np.array([[1, 2, 3], [1, 2, 3]], np.int64)
    finder = PrefixFinder(CascadeRule(1), BLOCK)
    for last, blocks in ((3 * BLOCK, 2), (2 * BLOCK + 1, 2), (2 * BLOCK, 1), (BLOCK + 1, 1)):
        groups = finder.groups(tables, np.arange(2), np.array([last, 3 * BLOCK]))
        assert [group.blocks for group in groups] == [blocks]
    assert finder.groups(tables, np.arange(2), np.array([BLOCK, 3 * BLOCK])) == []


def test_the_rule_by_bytes() -> None:
    """Of Llama 3.1 8B in bfloat16: a layer's token has 4,096 bytes."""
    rule = cascade_rule(4096, None)
    assert rule.least_saved == LEAST_BYTES // 4096 == 65536
    finder = PrefixFinder(rule, 64)
    for members, blocks, pays in ((64, 128, True), (64, 16, False), (8, 160, True), (2, 1027, False)):
        tables = np.zeros((members, blocks + 1), np.int64)
        tables[:, :blocks] = np.arange(1, blocks + 1)
        tables[:, blocks] = 5000 + np.arange(members)
        lens = np.full(members, blocks * 64 + 1)
        assert bool(finder.groups(tables, np.arange(members), lens)) == pays
    assert rule.saved(2, LEAST_TOKENS) == 0


def test_the_rule_by_tokens() -> None:
    rule = cascade_rule(4096, 100)
    finder = PrefixFinder(rule, 16)
    for blocks, pays in ((6, False), (7, True)):
        tables = np.tile(np.arange(1, 9), (2, 1))
        tables[1, blocks:] += 100
        assert bool(finder.groups(tables, np.arange(2), np.full(2, 8 * 16))) == pays


def test_prefixes_that_differ_by_one_block_each() -> None:
    """A tree as deep as there are requests."""
    count = 1500
    batch = prompts(*(range(1, 3 + number) for number in range(count)), width=count + 4)
    groups = PrefixFinder(CascadeRule(BLOCK), BLOCK).groups(*batch)
    assert all(group.blocks == common_blocks(batch, group.members) for group in groups)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_requests(count: int) -> None:
    batch = prompts(*([1, 2],) * count)
    assert PrefixFinder(CascadeRule(1), BLOCK).shared_prefixes(*batch, CPU) is None
