"""Who gets guesses: shares that hold, seconds they take, and the two against each other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from chiron_engine.policy.iteration.acceptance import FIRST_GUESSES, Acceptance
from chiron_engine.policy.iteration.autoscaler_inputs import EngineCapacity
from chiron_engine.policy.iteration.draft_costs import DraftCosts
from chiron_engine.policy.iteration.drafts import num_verified
from chiron_engine.policy.iteration.prompt_lookup import LONGEST, SHORTEST
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY
from chiron_engine.policy.iteration.speculation import (
    DRAFTED_STEPS,
    PROBE_STEPS,
    Guesses,
    Speculation,
    StepLoad,
)
from chiron_engine.policy.iteration.step_costs import StepCosts
from tests.policy.iteration_plant import step_stats

CAPACITY = EngineCapacity(64, 512, 16, 64 * 2048)
CHEAP = StepCosts(20e-3, 0.5e-3, 1e-7, 0.5e-3, 0.0)
DEAR = StepCosts(1e-3, 4e-3, 1e-7, 6e-3, 0.0)


def observed(n: int, kv: int, seconds: float, drafts: int = 0, guesses: int = 0, accepted: int = 0) -> Any:
    stats = step_stats(0, 0.0, seconds, n=n, kv=kv, prompt=0, context=0)
    stats.draft_requests, stats.drafted_tokens, stats.accepted_tokens = drafts, guesses, accepted
    return stats


def warmed(costs: StepCosts, n: int) -> Speculation:
    """It has seen plain steps of n requests."""
    speculation = Speculation(7, CAPACITY, costs)
    for _ in range(20):
        speculation.on_step(observed(n, 100 * n, costs.seconds(n, 100 * n)))
    return speculation


def repeating(number: int, outputs: int = 5) -> Request:
    request = Request(number, [number, *range(10), *range(10)], GREEDY, 5000)
    request.output_ids.extend(range(outputs))
    return request


def go_on(request: Request) -> None:
    request.output_ids.append((request.output_ids[-1] + 1) % 10)


def load(n: int) -> StepLoad:
    return StepLoad(n, 100 * n, 0, 0)


def choose(speculation: Speculation, requests: list[Request], room: int = 500) -> list[Guesses]:
    return speculation.choose(requests, load(len(requests)), room)


def test_guesses_hold_up_to_the_first_that_is_wrong() -> None:
    assert num_verified([5, 6, 7, 8], [6, 7, 8, 9]) == 4
    assert num_verified([5, 6, 7, 8], [6, 7, 9, 9]) == 3
    assert num_verified([5, 6, 7, 8], [7, 7, 8, 9]) == 1
    assert num_verified([5], [7]) == 1


def test_cheap_rows_get_guesses_and_dear_ones_do_not() -> None:
    (chosen,) = choose(warmed(CHEAP, 1), [repeating(0)])
    assert chosen.tokens == [5, 6, 7, 8, 9, 0, 1]
    assert choose(warmed(DEAR, 1), [repeating(0)]) == []


def test_nothing_is_guessed_before_steps_without_guesses_are_known() -> None:
    speculation = Speculation(7, CAPACITY, CHEAP)
    for _ in range(20):
        assert choose(speculation, [repeating(0)]) == []
    assert choose(warmed(CHEAP, 1), [repeating(n) for n in range(40)]) == []


def test_room_bounds_the_rows() -> None:
    requests = [repeating(number) for number in range(4)]
    chosen = choose(warmed(CHEAP, 4), requests, room=10)
    assert sum(len(guesses.tokens) for guesses in chosen) == 10
    assert choose(warmed(CHEAP, 4), requests, room=0) == []


@pytest.mark.parametrize(("requests", "looks"), [(1, 20), (3, 20), (4, 10), (32, 3)])
def test_a_large_batch_in_which_nothing_was_found_is_looked_at_less_often(requests: int, looks: int) -> None:
    speculation = warmed(CHEAP, requests)
    batch = [Request(number, list(range(20)), GREEDY, 5000) for number in range(requests)]
    looked = 0

    def seen() -> Iterator[Request]:
        nonlocal looked
        looked += 1
        yield from batch

    for step in range(20):
        for request in batch:
            request.output_ids.append(1000 + step)
        assert speculation.choose(seen(), load(requests), 500) == []
    assert looked == looks


def test_without_a_known_token_nothing_is_guessed() -> None:
    assert choose(warmed(CHEAP, 1), [repeating(0, outputs=0)]) == []


def test_the_last_token_asked_for_is_not_guessed() -> None:
    request = repeating(0)
    for left, most in ((1, 0), (2, 1), (4, 3)):
        request.max_tokens = len(request.output_ids) + left
        chosen = choose(warmed(CHEAP, 1), [request])
        assert sum(len(guesses.tokens) for guesses in chosen) == most


def test_guesses_that_were_not_computed_count_too() -> None:
    """Text that stops to repeat stops to be guessed, without a step that computed a guess."""
    speculation = warmed(CHEAP, 1)
    request = repeating(0)
    assert choose(speculation, [request])
    for number in range(60):  # pairs that were there, followed by something else each time
        request.output_ids.extend([3, 4, 100 + number])
        choose(speculation, [request])
        request.output_ids.extend([3, 4])
        choose(speculation, [request])
    assert choose(speculation, [request]) == []
    assert choose(speculation, [repeating(1)]), "another request starts from the engine's share"


def test_declined_for_their_seconds_they_are_tried_now_and_then() -> None:
    speculation = warmed(DEAR, 1)
    request = repeating(0)
    tried = []
    for step in range(5 * PROBE_STEPS):
        if choose(speculation, [request]):
            tried.append(step)
        go_on(request)
    assert tried == [PROBE_STEPS - 1, 3 * PROBE_STEPS - 1]


def test_a_probe_that_was_quick_turns_guesses_on() -> None:
    speculation = warmed(DEAR, 1)
    request = repeating(0)
    probes = 0
    for _ in range(20 * PROBE_STEPS):
        chosen = choose(speculation, [request])
        if chosen:
            probes += 1
            tokens = len(chosen[0].tokens)
            speculation.on_step(observed(1, 100, DEAR.seconds(1, 100), 1, tokens, tokens))
        else:
            speculation.on_step(observed(1, 100, DEAR.seconds(1, 100)))
        go_on(request)
    assert probes > 10 * PROBE_STEPS


def test_a_step_without_guesses_comes_now_and_then() -> None:
    speculation = warmed(CHEAP, 1)
    request = repeating(0)
    drafted = []
    for _ in range(3 * DRAFTED_STEPS):
        drafted.append(bool(choose(speculation, [request])))
        go_on(request)
    assert drafted.count(False) == 2 and all(drafted[:DRAFTED_STEPS])


def test_what_left_is_forgotten() -> None:
    speculation = warmed(CHEAP, 2)
    requests = [repeating(0), repeating(1)]
    choose(speculation, requests)
    for request in requests:
        speculation.forget(request)
    assert speculation.is_idle()


@pytest.mark.parametrize("length", [SHORTEST, 5, LONGEST, LONGEST + 3])
def test_shares_follow_what_held(length: int) -> None:
    engine = Acceptance()
    one, other = Acceptance(engine), Acceptance(engine)
    first = FIRST_GUESSES[min(length, LONGEST) - SHORTEST]
    assert one.share(length) == engine.share(length) == first
    for number in range(400):
        one.observe(length, number % 4 != 0)
    assert one.share(length) == pytest.approx(0.75, abs=0.05)
    assert other.share(length) == pytest.approx(engine.share(length)) == pytest.approx(0.75, abs=0.05)
    chances = one.held(length, 3)
    assert chances == sorted(chances, reverse=True)
    assert chances[0] == one.share(length)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_costs_of_drafts_and_of_guesses_are_told_apart(noise: float) -> None:
    costs = DraftCosts(0.0)
    rng = random.Random(0)
    for number in range(400):
        drafts = 1 + number % 9
        guesses = drafts * (1 + number % 7)
        extra_s = 2e-3 * drafts + 0.5e-3 * guesses + 30e-3 * rng.gauss(0.0, noise)
        costs.observe(drafts, guesses, extra_s, 30e-3)
    for drafts, guesses in ((1, 7), (4, 12), (8, 56)):
        expected = 2e-3 * drafts + 0.5e-3 * guesses
        assert costs.seconds(drafts, guesses) == pytest.approx(expected, rel=0.1 + 2 * noise)


def test_one_step_that_was_held_up_is_forgotten() -> None:
    costs = DraftCosts(0.5e-3)
    for _ in range(20):
        costs.observe(1, 7, 3.5e-3, 20e-3)
    costs.observe(1, 7, 5.0, 20e-3)
    assert costs.seconds(1, 7) < 20e-3
    for _ in range(150):
        costs.observe(1, 7, 3.5e-3, 20e-3)
    assert costs.seconds(1, 7) == pytest.approx(3.5e-3, rel=0.2)
