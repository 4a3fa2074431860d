"""Token ids to text, one token at a time: never half a character, never a lost one."""

from __future__ import annotations

import codecs
from functools import cache
from typing import Protocol

from tokenizers import Tokenizer, decoders

REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, so at most 4 tokens. More that still end in a replacement
# character are no unfinished character but an invalid one.
MAX_UNFINISHED_TOKENS = 16


class Detokenizer(Protocol):
    def feed(self, token_id: int) -> str:
        """The text that this token completes; often empty, never half a character."""
        ...

    def finish(self) -> str:
        """What is still held back, an unfinished character as U+FFFD."""
        ...


class Vocabulary:
    """A tokenizer's tokens as the detokenisers need them; shared by all requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}

    def is_silent(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether decoding passes the token over: special, or not in the tokenizer at all (models
        pad their vocabulary)."""
        if skip_special_tokens and token_id in self._special:
            return True
        return self.tokenizer.id_to_token(token_id) is None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token of a byte-level tokenizer stands for."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = _byte_level_bytes(self.tokenizer.id_to_token(token_id) or "")
        return known

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        if self.is_byte_level:
            return ByteLevelDetokenizer(self, skip_special_tokens)
        return WindowDetokenizer(self, skip_special_tokens)


class ByteLevelDetokenizer:
    """For byte-level tokenizers, where a token is a string of bytes whatever stands around it."""

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        if self._vocabulary.is_silent(token_id, self._skip_special_tokens):
            return ""
        return self._decoder.decode(self._vocabulary.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For any other tokenizer: decodes a short window twice and hands out what the new token added.

    The window begins with tokens already handed out, because decoders treat a text's beginning in
    their own way (Llama's drops its leading space). It moves on once a token completed some text.

    Where byte tokens form no valid UTF-8 the tokenizer's own decoder takes back characters that
    were complete before; a stream cannot, so there, and only there, the two differ.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []  # handed out; decodes to `_context_text`
        self._context_text = ""
        self._unfinished: list[int] = []

    def feed(self, token_id: int) -> str:
        if self._vocabulary.is_silent(token_id, self._skip_special_tokens):
            return ""
        self._unfinished.append(token_id)
        text = self._decode([*self._context, *self._unfinished])
        if text.endswith(REPLACEMENT) and len(self._unfinished) < MAX_UNFINISHED_TOKENS:
            return ""
        return self._hand_out(text)

    def finish(self) -> str:
        if not self._unfinished:
            return ""
        return self._hand_out(self._decode([*self._context, *self._unfinished]))

    def _hand_out(self, text: str) -> str:
        """The new part of `text`, the decoded window; the window moves on."""
        if text.startswith(self._context_text):
            new = text[len(self._context_text) :]
        else:  # invalid bytes made the decoder take back what was handed out
            new = self._decode(self._unfinished)
        self._context = self._next_context()
        self._context_text = self._decode(self._context)
        self._unfinished = []
        return new

    def _next_context(self) -> list[int]:
        """The shortest recent tokens that decode to some text: those that vanish at the beginning
        of a window cannot begin the next one."""
        window = [*self._context, *self._unfinished]
        for size in (len(self._unfinished), MAX_UNFINISHED_TOKENS):
            if REPLACEMENT not in (text := self._decode(window[-size:])) and text:
                return window[-size:]
        return window[-4 * MAX_UNFINISHED_TOKENS :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._vocabulary.tokenizer.decode(token_ids, skip_special_tokens=False)


@cache
def _byte_of_char() -> dict[str, int]:
    """The alphabet of GPT-2's byte-level BPE (Radford et al. 2019): printable Latin-1 bytes stand
    for themselves, the other 68 take the code points from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table


def _byte_level_bytes(token: str) -> bytes:
    """Added tokens may hold characters outside the alphabet; those stand for their own UTF-8."""
    table = _byte_of_char()
    if all(char in table for char in token):
        return bytes(table[char] for char in token)
    return token.encode()
