"""Which decoding requests begin with the same blocks, and whether reading these once for all of them pays.

With the prefix cache, requests with the same system prompt or the same document have the very same blocks in
their tables. Decode attention reads them for each request; cascade attention once for each group. A request
can be in one group, so where some of a group go on together, the longer prefix of few is weighed against the
shorter one of many.

Tables only grow while a request decodes, so groups hold for as long as the same requests do: this is computed
when the batch changes, and not in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from chiron_kernels.gpu.paged_kv import LARGEST_HEAD
from chiron_kernels.shared_prefixes import SharedPrefixes

from chiron_engine.model.spec import ModelSpec

from .uploads import IntArray, upload_array

MEMBER_TOKENS = 128
"""What a request in a group costs, in tokens of KV that could be read instead. Its queries are copied, and
of its result, in float32, a part for each of up to 8 splits of the prefix is written and read, then joined
with the rest: 75 bytes for each number of its queries. A token has 4 for each of its keys, so that is 19
tokens for each query head of a key head, of which there are 4 to 8 in most models."""

LEAST_TOKENS = 2 * MEMBER_TOKENS
"""Of a prefix: two requests that share less lose by it."""

LEAST_BYTES = 256 << 20
"""Of a layer's KV that must not be read again for a step to be worth it. An H100 reads them in 80 us, in
which the host queues the launches of a layer, more or less: a step with shared prefixes is not replayed from
a CUDA graph, so that a quicker layer would wait for the host. By calculation: nothing was measured."""


@dataclass(frozen=True, slots=True)
class CascadeRule:
    """What a group must save, in tokens of one layer's KV that are not read again.

    least_tokens: of its prefix. member_tokens: what each of its requests costs. least_saved: by all groups of
    a step together, what their requests cost taken off.
    """

    least_tokens: int
    member_tokens: int = 0
    least_saved: int = 1

    def saved(self, members: int, tokens: int) -> int:
        """By a group of so many requests with a prefix of so many tokens; below 0 where it costs more."""
        return (members - 1) * tokens - members * self.member_tokens


def cascade_rule(token_bytes: int, min_tokens: int | None) -> CascadeRule:
    """token_bytes: of one layer's KV. min_tokens: of a prefix, where that alone is to decide."""
    if min_tokens is not None:
        return CascadeRule(min_tokens)
    return CascadeRule(LEAST_TOKENS, MEMBER_TOKENS, -(-LEAST_BYTES // token_bytes))


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """members: numbers of requests. blocks: that all of them begin with."""

    members: tuple[int, ...]
    blocks: int


@dataclass(slots=True)
class _Node:
    """Requests whose tables agree in the first `blocks` entries: those that are in no group yet, and groups
    with longer prefixes. parent: the node of the next shorter prefix."""

    parent: _Node | None
    blocks: int
    loose: list[int] = field(default_factory=list)
    groups: list[PrefixGroup] = field(default_factory=list)


class PrefixFinder:
    """Finds the groups of a batch by one rule, for tables of blocks of `block_size` tokens."""

    def __init__(self, rule: CascadeRule, block_size: int) -> None:
        self._rule, self._block_size = rule, block_size
        self._least_blocks = max(-(-rule.least_tokens // block_size), 1)

    def shared_prefixes(
        self, tables: IntArray, slots: IntArray, lens: IntArray, device: torch.device
    ) -> SharedPrefixes | None:
        """For `cascade_attention`, on `device`; None where it does not pay. tables: [S, W], of all slots.
        slots: [B]. lens: [B], tokens of each request, its newest included."""
        groups = self.groups(tables, slots, lens)
        return self._on_device(groups, slots, device) if groups else None

    def groups(self, tables: IntArray, slots: IntArray, lens: IntArray) -> list[PrefixGroup]:
        """The groups worth it, none where all of them together are not."""
        # A block that holds a newest token is never part of a prefix: something must be left of a request.
        whole = (lens - 1) // self._block_size
        found = self._groups_among(tables, slots, whole)
        saved = sum(map(self._saved_by, found))
        return found if saved >= self._rule.least_saved else []

    def _saved_by(self, group: PrefixGroup) -> int:
        return self._rule.saved(len(group.members), group.blocks * self._block_size)

    def _groups_among(self, tables: IntArray, slots: IntArray, whole: IntArray) -> list[PrefixGroup]:
        """Groups that save something, from the tree of prefixes: greedy, from the longest on. They save at
        least as much as any groups each of which is all requests with some prefix."""
        candidates = self._candidates(tables, slots, whole)
        if not len(candidates):
            return []
        nodes = _tree(tables[slots[candidates], : whole[candidates].max()], whole[candidates], candidates)
        for node in reversed(nodes):
            self._settle(node)
            if node.parent is not None:
                node.parent.loose += node.loose
                node.parent.groups += node.groups
        return nodes[0].groups

    def _candidates(self, tables: IntArray, slots: IntArray, whole: IntArray) -> IntArray:
        """Requests whose last block of the shortest prefix is another's, too: without any, as is usual, that
        is all there is to do."""
        long_enough = np.flatnonzero(whole >= self._least_blocks)
        if not len(long_enough):  # tables may be narrower than that
            return long_enough
        last = tables[slots[long_enough], self._least_blocks - 1]
        return long_enough[_in_several(last)]

    def _settle(self, node: _Node) -> None:
        """Make a group of the loose requests, and of those in groups that save less by their longer prefix
        than their requests would by joining in, if that saves more than these groups do."""
        if node.blocks < self._least_blocks:
            return
        a_member = node.blocks * self._block_size - self._rule.member_tokens

        def stays(group: PrefixGroup) -> bool:
            return self._saved_by(group) >= len(group.members) * a_member

        joining = [group for group in node.groups if not stays(group)]
        together = PrefixGroup(
            (*node.loose, *chain.from_iterable(group.members for group in joining)), node.blocks
        )
        if self._saved_by(together) <= sum(map(self._saved_by, joining)):
            return
        node.loose, node.groups = [], [*filter(stays, node.groups), together]

    def _on_device(
        self, groups: Sequence[PrefixGroup], slots: IntArray, device: torch.device
    ) -> SharedPrefixes:
        """In one copy. A group of all requests has them in order, so that nothing need be gathered for it."""
        members = [sorted(group.members) for group in groups]
        lens = [group.blocks * self._block_size for group in groups]
        skipped = np.zeros(len(slots), np.int64)
        for of_group, length in zip(members, lens, strict=True):
            skipped[of_group] = length
        numbers = list(chain.from_iterable(members))
        starts = np.cumsum([0, *map(len, members)])
        rows = slots[[of_group[0] for of_group in members]]
        parts = [np.asarray(part, np.int64) for part in (numbers, starts, rows, lens, skipped)]
        packed = upload_array(np.concatenate(parts), device)
        on_device = packed.split([len(part) for part in parts])
        return SharedPrefixes(
            members=on_device[0],
            starts=on_device[1],
            table_rows=on_device[2],
            lens=on_device[3],
            skipped=on_device[4],
            longest=max(lens),
            everyone=numbers == list(range(len(slots))),
        )


def prefix_finder(
    spec: ModelSpec, kv_dtype: torch.dtype, block_size: int, min_tokens: int | None
) -> PrefixFinder | None:
    """For a model's mean layer; min_tokens as `cascade_rule` has it. None where no layer would gain: a prefix
    is soon outside of a window, and heads too large for Triton's kernels go through torch."""
    layers = [layer for layer in spec.unwindowed_layers if layer.head_dim <= LARGEST_HEAD]
    if not layers:
        return None
    numbers = sum(2 * layer.kv_heads * layer.head_dim for layer in layers) // len(layers)
    return PrefixFinder(cascade_rule(numbers * kv_dtype.itemsize, min_tokens), block_size)


def _in_several(values: IntArray) -> np.ndarray:
    """Which of the values are there more than once: truth values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    several: np.ndarray = counts[inverse] > 1
    return several


def _tree(rows: IntArray, whole: IntArray, names: IntArray) -> list[_Node]:
    """Nodes wherever some rows go on together while others do not, each after its parent; the first has all.

    rows: [N, W]. whole: [N], entries of each row that count. names: [N], what `loose` calls them. Each row is
    in the node of the longest prefix that it shares."""
    nodes: list[_Node] = []
    to_part: list[tuple[_Node | None, IntArray, int]] = [(None, np.arange(len(rows)), 0)]
    for parent, members, known in to_part:  # which grows
        blocks = _common_blocks(rows[members, known:], whole[members] - known) + known
        node = _Node(parent, blocks)
        nodes.append(node)
        ended = whole[members] == blocks
        node.loose += names[members[ended]].tolist()
        going_on = members[~ended]
        if not len(going_on):
            continue
        following = rows[going_on, blocks]
        several = _in_several(following)
        node.loose += names[going_on[~several]].tolist()
        to_part += [
            (node, going_on[following == block], blocks + 1) for block in np.unique(following[several])
        ]
    return nodes


def _common_blocks(rows: IntArray, whole: IntArray) -> int:
    """How many leading entries are the same in all rows, of those that count in all."""
    most = int(whole.min())
    differ = (rows[:, :most] != rows[0, :most]).any(axis=0)
    return int(differ.argmax()) if differ.any() else most
