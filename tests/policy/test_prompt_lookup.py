"""Guesses from a sequence's own tokens: the same as a scan of all of them, however they come in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chiron_engine.policy.iteration.prompt_lookup import CANDIDATES, LONGEST, SHORTEST, PromptLookup, guesses

TOKENS = st.lists(st.integers(0, 3), max_size=60)


def agreeing(tokens: list[int], place: int) -> int:
    """Tokens before `place` that equal those at the end, LONGEST at most."""
    length = 0
    while length < min(LONGEST, place) and tokens[place - length - 1] == tokens[len(tokens) - length - 1]:
        length += 1
    return length


def scan(tokens: list[int]) -> tuple[int, int]:
    """(position of the guess, tokens that agree before it), (-1, 0) without one."""
    places = [p for p in range(len(tokens) - 1, SHORTEST - 1, -1) if agreeing(tokens, p) >= SHORTEST]
    places = places[:CANDIDATES]
    if not places:
        return -1, 0
    best = max(places, key=lambda place: (agreeing(tokens, place), place))
    return best, agreeing(tokens, best)


@given(TOKENS, st.lists(st.integers(1, 5)))
def test_finds_what_a_scan_finds_however_tokens_come_in(tokens: list[int], pieces: list[int]) -> None:
    lookup = PromptLookup()
    known = 0
    for piece in [*pieces, len(tokens)]:
        lookup.extend(tokens[known : known + piece])
        known = min(known + piece, len(tokens))
        assert (lookup.source, lookup.length) == scan(tokens[:known])


@given(TOKENS, st.integers(0, 9))
def test_guesses_follow_the_place_found(tokens: list[int], count: int) -> None:
    found = guesses(tokens, count)
    source, _ = scan(tokens)
    if source < 0:
        assert found == []
        return
    everything = [*tokens, *found]
    assert len(found) == count
    assert found == everything[source : source + count]


def test_prefers_the_place_where_more_agrees() -> None:
    assert guesses([1, 2, 3, 4, 9, 2, 3, 8, 1, 2, 3], 2) == [4, 9]
    assert guesses([1, 2, 3, 4, 9, 2, 3, 8, 7, 2, 3], 2) == [8, 7]


def test_what_repeats_goes_on_with_itself() -> None:
    assert guesses([5, 6, 5, 6, 5], 5) == [6, 5, 6, 5, 6]


def test_large_ids_are_kept_apart() -> None:
    assert guesses([1 << 31, 1, 7, 1 << 31, 2], 1) == []
