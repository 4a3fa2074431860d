"""Steps run before the first request so that no step with shared prefixes waits for Triton to compile.

Such a step has kernels of its own, or in other forms than the rest: attention over the prefix, in splits or
not and with tiles of as many rows as its group has, decode attention that gives its sums, and the joining of
both, for all requests or some.
"""

from __future__ import annotations

from .shared_prefixes import CascadeRule, PrefixFinder
from .torch_executor import TorchExecutor
from .trial_steps import TrialRequests

LONG_PREFIX = 1024
"""Tokens: enough for splits."""

MOST_ROWS = 128
"""Of a tile over the prefix: more requests, even with one query head to a key head, make more such tiles."""


def launch_cascade_variants(executor: TorchExecutor) -> None:
    """Decode in groups of 2, 4 and more requests, over a prefix of one block and a long one; whatever does
    not fit is left out. Overwrites KV blocks: only before use. Nothing where no prefixes are looked for."""
    finder, block_size = executor.prefixes, executor.shape.block_size
    if finder is None:
        return
    executor.prefixes = PrefixFinder(CascadeRule(block_size), block_size)
    for blocks in (1, -(-LONG_PREFIX // block_size)):
        sharers = 2
        while _decode_together(executor, sharers, blocks) and sharers < MOST_ROWS:
            sharers *= 2
    executor.prefixes = finder


def _decode_together(executor: TorchExecutor, sharers: int, blocks: int) -> bool:
    """One token for so many requests with so many blocks in common, and again with one beside them. False
    where they do not fit."""
    shape = executor.shape
    known = blocks * shape.block_size + 1
    width = -(-(known + 1) // shape.block_size)
    together = blocks + sharers * (width - blocks)
    if known >= shape.max_model_len or sharers > shape.max_slots or together > shape.num_device_blocks:
        return False
    one_more = sharers < shape.max_slots and together + width <= shape.num_device_blocks
    for count in (sharers, sharers + 1) if one_more else (sharers,):
        trial = TrialRequests(executor, count, known, 1, sharers=sharers, shared=blocks)
        trial.prefill(start=known - 1)
        trial.decode()
        trial.leave()
    return True
