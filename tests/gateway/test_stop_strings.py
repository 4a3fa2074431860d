"""The cut text depends on the text alone, not on how it arrives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron_engine.gateway.no_tokenizer import NoTokenizer
from chiron_engine.gateway.output_text import OutputText
from chiron_engine.gateway.stop_strings import StopStrings

ALPHABET = "ab👍é"
TEXT = st.text(ALPHABET, max_size=30)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: the shortest beginning that ends in a stop string, cut before the longest one."""
    for end in range(len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            stop = max(endings, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(pieces=st.lists(TEXT, max_size=8), stops=STOPS)
def test_equals_the_definition_for_any_cutting(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = "".join([*map(matcher.feed, pieces), matcher.finish()])
    assert (shown, matcher.matched) == expected("".join(pieces), stops)


@given(text=TEXT, stops=STOPS)
def test_never_shows_what_it_must_take_back(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    final = expected(text, stops)[0]
    shown = ""
    for char in text:
        shown += matcher.feed(char)
        assert final.startswith(shown)


def test_holds_back_no_more_than_it_must() -> None:
    matcher = StopStrings(["</s>"])
    assert matcher.feed("x</") == "x"
    assert matcher.feed("p") == "</p"
    assert matcher.feed("y</s>z") == "y"
    assert matcher.matched == "</s>"
    assert matcher.feed("more") == ""


def test_stop_strings_are_looked_for_after_min_tokens() -> None:
    detokenizer = NoTokenizer().detokenizer()
    detokenizer.feed = lambda token: chr(token)  # type: ignore[method-assign]
    text = OutputText(detokenizer, ["ab"], min_tokens=3)
    assert text.feed_all([ord(letter) for letter in "abaab"], False) == ("aba", 5)
    assert text.is_stopped


def test_refuses_an_empty_stop() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings([""])


def test_one_string_is_no_list_of_characters() -> None:
    with pytest.raises(ValueError, match="stop is the string 'end'; it must be a list"):
        StopStrings("end")
