"""Prompts of the lengths a trace says, as token ids drawn from a model's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from chiron_engine.sim.workload import Stream

Tokens = NDArray[np.uint32]
CACHED_BLOCKS = 4096


class PromptSource:
    """The prompt of each request depends on the seed, its stream and its row alone.

    Where the trace names the blocks that prompts consist of, equal blocks give equal tokens, so that
    a prefix cache finds what it would have found then. Blocks are not shared between classes.
    """

    def __init__(self, vocab_size: int, never: Sequence[int], seed: int) -> None:
        """never: ids not to draw, as those of end tokens. Raises ValueError if none is left."""
        self._ids = np.setdiff1d(np.arange(vocab_size, dtype=np.uint32), np.asarray(never, dtype=np.uint32))
        if not len(self._ids):
            raise ValueError(f"a vocabulary of {vocab_size} tokens leaves none to make prompts of")
        self._seed = seed
        self._block = lru_cache(CACHED_BLOCKS)(self._draw_block)

    def tokens(self, stream: Stream, row: int) -> Tokens:
        trace = stream.trace
        length = trace.prompt_tokens[row]
        if trace.prefix_blocks is None:
            return self._draw((stream.slo_class, 0, row), length)
        size = trace.prefix_block_tokens
        wanted = trace.prefix_blocks[row][: -(-length // size)]
        pieces = [self._block(int(stream.slo_class), block, size) for block in wanted]
        missing = length - size * len(pieces)
        if missing > 0:  # a trace may name fewer blocks than the prompt has
            pieces.append(self._draw((stream.slo_class, 0, row), missing))
        return np.concatenate(pieces)[:length]

    def _draw_block(self, slo_class: int, block: int, tokens: int) -> Tokens:
        return self._draw((slo_class, 1, block), tokens)

    def _draw(self, key: tuple[int, int, int], tokens: int) -> Tokens:
        rng = np.random.default_rng((self._seed, *key))
        return self._ids[rng.integers(len(self._ids), size=tokens)]
