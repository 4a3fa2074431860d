"""Streamed text equals decoded text, for byte-level and byte-fallback tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from chiron_engine.gateway.detokenizer import MAX_UNFINISHED_TOKENS, REPLACEMENT, Vocabulary

SAMPLE = ["the", " cat", "é", "你好", "👩‍🚀", " ", "\n"]


def byte_level() -> Tokenizer:
    """All 256 bytes, a few words, added tokens with characters outside the byte alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: place for place, char in enumerate(alphabet)}
    for word in ("Ġcat", "the", "Ã©", "ä½"):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("naïve ✓", normalized=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2's way: `▁` for a space, `<0xAB>` for bytes, a leading space that is dropped."""
    vocabulary = {"<unk>": 0}
    vocabulary.update({f"<0x{byte:02X}>": byte + 1 for byte in range(256)})
    for word in ("▁", "▁the", "cat", "▁▁", "é", "."):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


BYTE_LEVEL = Vocabulary(byte_level())
BYTE_FALLBACK = Vocabulary(byte_fallback())
SIZE = {id(vocabulary): vocabulary.tokenizer.get_vocab_size() for vocabulary in (BYTE_LEVEL, BYTE_FALLBACK)}


def stream(vocabulary: Vocabulary, ids: list[int], skip: bool) -> list[str]:
    detokenizer = vocabulary.detokenizer(skip)
    return [*map(detokenizer.feed, ids), detokenizer.finish()]


def utf8_tokens(vocabulary: Vocabulary, text: str) -> list[int]:
    """`text` byte by byte, the hardest way to write it."""
    if vocabulary is BYTE_FALLBACK:
        return [byte + 1 for byte in text.encode()]
    table = {vocabulary.token_bytes(i): i for i in range(256)}
    return [table[bytes([byte])] for byte in text.encode()]


@given(ids=st.lists(st.integers(0, SIZE[id(BYTE_LEVEL)] + 2), max_size=40), skip=st.booleans())
def test_byte_level_stream_equals_full_decode_for_any_tokens(ids: list[int], skip: bool) -> None:
    expected = BYTE_LEVEL.tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(BYTE_LEVEL, ids, skip)) == expected


PIECES = st.one_of(
    st.text(min_size=1, max_size=4).map(lambda text: utf8_tokens(BYTE_FALLBACK, text)),
    st.integers(257, SIZE[id(BYTE_FALLBACK)] - 1).map(lambda token: [token]),
)


@given(pieces=st.lists(PIECES, max_size=25), skip=st.booleans())
@settings(max_examples=200)
def test_byte_fallback_stream_equals_full_decode_for_valid_bytes(pieces: list[list[int]], skip: bool) -> None:
    ids = [token for piece in pieces for token in piece]
    expected = BYTE_FALLBACK.tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(BYTE_FALLBACK, ids, skip)) == expected


@given(ids=st.lists(st.integers(1, SIZE[id(BYTE_FALLBACK)] - 1), max_size=60))
def test_byte_fallback_survives_any_bytes_and_loses_no_word(ids: list[int]) -> None:
    ids.append(BYTE_FALLBACK.tokenizer.token_to_id("cat"))
    assert "".join(stream(BYTE_FALLBACK, ids, True)).endswith("cat")


@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", [*SAMPLE, "".join(SAMPLE)])
def test_characters_come_whole_and_as_soon_as_complete(vocabulary: Vocabulary, text: str) -> None:
    text = "a" + text  # a leading space is dropped by design of the second
    ids = utf8_tokens(vocabulary, text)
    shown = ""
    detokenizer = vocabulary.detokenizer()
    for place, token in enumerate(ids):
        shown += detokenizer.feed(token)
        assert REPLACEMENT not in shown
        complete = text.encode()[: place + 1].decode(errors="ignore")
        assert shown == complete
    assert detokenizer.finish() == ""


def test_an_unfinished_character_shows_at_the_end_only() -> None:
    for vocabulary in (BYTE_LEVEL, BYTE_FALLBACK):
        first_bytes = utf8_tokens(vocabulary, "👍")[:3]
        *pieces, rest = stream(vocabulary, first_bytes, True)
        assert "".join(pieces) == ""
        assert set(rest) == {REPLACEMENT}


def test_work_per_token_is_bounded() -> None:
    """Bytes that never become a character must not make the window grow."""
    detokenizer = BYTE_FALLBACK.detokenizer()
    for _ in range(1000):
        detokenizer.feed(0xFF + 1)
        assert len(detokenizer._context) + len(detokenizer._unfinished) <= 5 * MAX_UNFINISHED_TOKENS  # type: ignore[attr-defined]


def test_padding_ids_of_the_model_are_silent() -> None:
    size = SIZE[id(BYTE_LEVEL)]
    assert "".join(stream(BYTE_LEVEL, [size, size + 1000], False)) == ""
