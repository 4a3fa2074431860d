"""The text side of a model without a tokenizer: ids pass through, text is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .text import ModelText, TextError

REFUSAL = "this server has no tokenizer and takes no text; send token_ids"


class NoTokenizer(ModelText):
    has_tokenizer = False
    vocab_size = 0

    def __init__(self) -> None:
        """Needs nothing of what a tokenizer has."""

    @property
    def has_chat_template(self) -> bool:
        return False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        raise TextError(REFUSAL)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        raise TextError(REFUSAL)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        raise TextError("this server has no tokenizer and turns no token ids into text")

    def detokenizer(self, skip_special_tokens: bool = True) -> Silent:
        return Silent()

    def surely_over(self, text: str, max_tokens: int) -> bool:
        return False


class Silent:
    """A detokenizer that knows no text."""

    def feed(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""
