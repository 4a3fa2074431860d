from __future__ import annotations

from chiron_engine.policy.iteration.output_lengths import WINDOW, OutputLengths


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
