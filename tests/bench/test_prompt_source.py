"""Prompts: of the trace's lengths, of the model's vocabulary, the same for the same seed, and with
common beginnings where the trace has them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron_engine.bench.prompts import PromptSource
from chiron_engine.sim.workload import Stream
from tests.bench.recorded_runs import trace, workload

VOCABULARY, END = 50, 49


def stream_of(lengths: list[int], blocks: list[list[int]] | None = None, size: int = 8) -> Stream:
    made = trace(
        [0.0] * len(lengths), lengths, [1] * len(lengths), prefix_blocks=blocks, prefix_block_tokens=size
    )
    found = workload(made).interactive
    assert found is not None
    return found


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_lengths_vocabulary_and_seed(lengths: list[int], seed: int) -> None:
    stream = stream_of(lengths)
    source, again = (PromptSource(VOCABULARY, [END], seed) for _ in range(2))
    for row, length in enumerate(lengths):
        tokens = source.tokens(stream, row)
        assert len(tokens) == length
        assert tokens.max() < END
        assert np.array_equal(tokens, again.tokens(stream, row))


def test_other_rows_seeds_and_classes_give_other_prompts() -> None:
    both = workload(trace([0.0, 0.0], [64, 64], [1, 1]), trace([0.0], [64], [1]))
    assert both.interactive is not None
    assert both.batch is not None
    first, second = PromptSource(VOCABULARY, [], 1), PromptSource(VOCABULARY, [], 2)
    prompts = [
        first.tokens(both.interactive, 0),
        first.tokens(both.interactive, 1),
        second.tokens(both.interactive, 0),
        first.tokens(both.batch, 0),
    ]
    assert len({prompt.tobytes() for prompt in prompts}) == 4


def test_equal_blocks_give_equal_tokens_and_others_do_not() -> None:
    stream = stream_of([20, 24, 8], [[0, 1, 2], [0, 1, 3], [4]])
    source = PromptSource(VOCABULARY, [], 0)
    first, second, third = (source.tokens(stream, row) for row in range(3))
    assert [len(first), len(second), len(third)] == [20, 24, 8]
    assert np.array_equal(first[:16], second[:16])
    assert not np.array_equal(first[16:20], second[16:20])
    assert not np.array_equal(first[:8], third)
    assert not np.array_equal(first[:8], first[8:16])


def test_a_cut_prompt_keeps_its_beginning() -> None:
    blocks = [[0, 1, 2], [0, 1, 2]]
    stream = stream_of([24, 11], blocks)
    source = PromptSource(VOCABULARY, [], 0)
    assert np.array_equal(source.tokens(stream, 0)[:11], source.tokens(stream, 1))


def test_a_vocabulary_of_end_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens leaves none"):
        PromptSource(2, [0, 1], 0)
