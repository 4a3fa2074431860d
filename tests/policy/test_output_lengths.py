from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from chiron_engine.policy.iteration.output_lengths import WINDOW, OutputLengths, peak_tokens


def simulated_peak(requests: list[tuple[int, int]]) -> int:
    """Let every request grow by a token a step and leave at its end; the most held at once."""
    live = [list(r) for r in requests]
    peak = sum(now for now, _ in live)
    while live:
        live = [[now + 1, left - 1] for now, left in live if left > 0]
        peak = max(peak, sum(now for now, _ in live))
    return peak


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 30)), max_size=12))
def test_the_closed_form_equals_stepping_to_the_end(requests: list[tuple[int, int]]) -> None:
    assert peak_tokens(requests, block_size=1) == simulated_peak(requests)


def test_every_request_may_waste_part_of_a_block() -> None:
    assert peak_tokens([(10, 5), (10, 5)], block_size=16) == 2 * (15 + 15)


def test_without_history_an_output_may_grow_by_as_much_again() -> None:
    lengths = OutputLengths()
    assert lengths.remaining(0, 10_000) == 256
    assert lengths.remaining(1000, 10_000) == 1000
    assert lengths.remaining(1000, 7) == 7


def test_history_conditions_on_what_was_produced() -> None:
    lengths = OutputLengths()
    for length in [*range(10, 30), *range(100, 140)]:
        lengths.observe(length)
    assert lengths.remaining(0, 10_000) in range(100, 140)
    assert 0 < lengths.remaining(90, 10_000) < 50
    assert lengths.remaining(90, 3) == 3


def test_only_the_last_outputs_count() -> None:
    lengths = OutputLengths()
    for _ in range(WINDOW):
        lengths.observe(1000)
    for _ in range(WINDOW):
        lengths.observe(20)
    assert lengths.remaining(0, 10_000) == 20
