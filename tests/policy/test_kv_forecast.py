"""The forecast against letting every request grow to its end."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from chiron_engine.policy.iteration.kv_forecast import KEEP_STEPS, KvForecast
from chiron_engine.policy.iteration.request import Request
from tests.core.engines import make_request


def simulated_peak(requests: list[tuple[int, int]]) -> int:
    """Let every request of (tokens now, tokens to come) grow by a token a step and leave at its end;
    the most held at once."""
    live = requests
    peak = 0
    while live:
        peak = max(peak, sum(now for now, _ in live))
        live = [(now + 1, left - 1) for now, left in live if left > 0]
    return peak


lengths = st.tuples(st.integers(1, 50), st.integers(0, 30))


class ToCome(dict[Request, int]):
    """Predictions that do not depend on the step."""

    def __call__(self, request: Request, step: int) -> int:
        return self[request]


def requests_of(pairs: list[tuple[int, int]]) -> tuple[list[Request], ToCome]:
    made = [make_request(number, now, 1000) for number, (now, _) in enumerate(pairs)]
    return made, ToCome({request: left for request, (_, left) in zip(made, pairs, strict=True)})


@given(running=st.lists(lengths, max_size=12), newcomer=lengths, step=st.integers(0, 500))
def test_the_forecast_equals_stepping_to_the_end(
    running: list[tuple[int, int]], newcomer: tuple[int, int], step: int
) -> None:
    (new, *others), left = requests_of([newcomer, *running])
    peak = simulated_peak([newcomer, *running])
    forecast = KvForecast(block_size=1, remaining=left)
    table = dict.fromkeys(others)
    assert forecast.fits(new, table, step, peak)
    assert not forecast.fits(new, table, step, peak - 1)


@given(
    running=st.lists(lengths, min_size=1, max_size=10),
    newcomers=st.lists(lengths, max_size=5),
    leaving=st.sets(st.integers(0, 9)),
    probe=lengths,
)
def test_joining_and_leaving_equal_a_new_forecast(
    running: list[tuple[int, int]],
    newcomers: list[tuple[int, int]],
    leaving: set[int],
    probe: tuple[int, int],
) -> None:
    (new, *others), left = requests_of([probe, *running, *newcomers])
    first, later = others[: len(running)], others[len(running) :]
    forecast = KvForecast(block_size=4, remaining=left)
    forecast.fits(new, dict.fromkeys(first), 7, 1000)
    for request in later:
        forecast.join(request, 7)
    stay = [r for number, r in enumerate(others) if number not in leaving]
    for number, request in enumerate(others):
        if number in leaving:
            forecast.leave(request)
    for capacity in range(0, 900, 7):
        table = dict.fromkeys(stay)
        fresh = KvForecast(block_size=4, remaining=left).fits(new, table, 7, capacity)
        assert forecast.fits(new, table, 7, capacity) == fresh


def test_every_request_may_waste_part_of_a_block() -> None:
    (new, other), left = requests_of([(10, 5), (10, 5)])
    forecast = KvForecast(block_size=16, remaining=left)
    assert forecast.fits(new, {other: None}, 0, 2 * (15 + 15))
    assert not forecast.fits(new, {other: None}, 0, 2 * (15 + 15) - 1)


def test_one_that_outlives_its_prediction_gets_another() -> None:
    (new, other), left = requests_of([(10, 5), (10, 5)])
    forecast = KvForecast(block_size=1, remaining=left)
    table = {other: None}
    assert forecast.fits(new, table, 0, 2 * 15)
    other.decode_since = 0
    assert not forecast.fits(new, table, 6, 2 * 15), "it holds 16 and will hold 21 beside 15"
    assert forecast.fits(new, table, 6, 21 + 15)


def test_predictions_are_renewed_after_a_while() -> None:
    (new, other), left = requests_of([(10, 5), (10, 3 * KEEP_STEPS)])
    forecast = KvForecast(block_size=1, remaining=left)
    assert not forecast.fits(new, {other: None}, 0, 100)
    left[other] = 5
    other.decode_since = 0
    assert not forecast.fits(new, {other: None}, KEEP_STEPS - 1, 150)
    assert forecast.fits(new, {other: None}, KEEP_STEPS, 150)
