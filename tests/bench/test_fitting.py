"""Requests are cut to the context, and as little as need be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron_engine.bench.fitting import fit_context
from tests.bench.recorded_runs import trace, workload

LENGTHS = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20)


@given(lengths=LENGTHS, context=st.integers(2, 4000))
def test_what_fits_stays_and_the_rest_just_fits(lengths: list[tuple[int, int]], context: int) -> None:
    prompts, outputs = [list(column) for column in zip(*lengths, strict=True)]
    asked = workload(trace([0.0] * len(lengths), prompts, outputs))
    fitted, clipped = fit_context(asked, context)
    assert fitted.interactive is not None
    made = fitted.interactive.trace
    pairs = list(zip(made.prompt_tokens, made.output_tokens, strict=True))
    assert clipped.prompts == sum(new[0] < old[0] for new, old in zip(pairs, lengths, strict=True))
    assert clipped.outputs == sum(new[1] < old[1] for new, old in zip(pairs, lengths, strict=True))
    for (prompt, output), (old_prompt, old_output) in zip(pairs, lengths, strict=True):
        assert prompt >= 1
        assert output >= 1
        assert output >= min(old_output, context // 2)
        if old_prompt + old_output <= context:
            assert (prompt, output) == (old_prompt, old_output)
        else:
            assert prompt + output == context


def test_deadlines_stay_what_the_trace_asked_for() -> None:
    asked = workload(None, trace([0.0], [10], [1000]))
    fitted, clipped = fit_context(asked, 100)
    assert asked.batch is not None
    assert fitted.batch is not None
    assert fitted.batch.completion_s == asked.batch.completion_s
    assert (clipped.prompts, clipped.outputs) == (0, 1)
    assert fitted.batch.trace.output_tokens[0] == 90


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="the context holds 1 tokens"):
        fit_context(workload(trace([0.0], [1], [1])), 1)
