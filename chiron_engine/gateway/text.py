"""A model's text side: its tokenizer, its chat template and what turns ids back into text.

Needs the model's directory and nothing of torch or transformers, whose imports take seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer, processors

from .chat_template import ChatTemplate, TemplateFailure
from .detokenizer import Detokenizer, Vocabulary

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class TextError(ValueError):
    """This text cannot be turned into token ids, or these ids into text."""


class ModelFilesError(ValueError):
    """The model's directory lacks a usable tokenizer or chat template."""


class ModelText:
    """Encodes and decodes for one model. Safe to use from several threads."""

    has_tokenizer = True

    def __init__(
        self, tokenizer: Tokenizer, chat_template: str | None, special_tokens: Mapping[str, str]
    ) -> None:
        """Raises TemplateFailure for a chat template that does not compile."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = ChatTemplate(chat_template) if chat_template is not None else None
        self._special_tokens = dict(special_tokens)
        self._vocabulary = Vocabulary(tokenizer)
        tokens = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(tokens.values(), default=-1) + 1
        self._longest_token = max(map(len, tokens), default=1)

    @classmethod
    def from_directory(cls, directory: str | Path) -> Self:
        """Read tokenizer.json, tokenizer_config.json and the chat template beside them.

        Raises ModelFilesError naming the file that is missing or broken.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelFilesError(f"{directory} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise ModelFilesError(f"{path} is no tokenizer: {error}") from error
        config = _read_json(directory / "tokenizer_config.json")
        special = _special_tokens(config)
        _set_post_processor(tokenizer, config, special)
        try:
            return cls(tokenizer, _chat_template(directory, config), special)
        except TemplateFailure as error:
            raise ModelFilesError(f"{directory}: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises TextError for text with lone surrogates, which is no Unicode text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"the text has a lone surrogate at character {error.start}") from None
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of the rendered chat; the template itself brings all special tokens."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """`messages` have `role` and `content`. Raises TextError where the template refuses them or
        the model has none."""
        if self._template is None:
            raise TextError("this model has no chat template; send a text or token ids")
        try:
            return self._template.render(messages, self._special_tokens)
        except TemplateFailure as error:
            raise TextError(str(error)) from error

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Raises TextError for ids outside the tokenizer."""
        ids = list(token_ids)
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise TextError(f"token id {token_id} is outside the tokenizer [0, {self.vocab_size})")
        detokenizer = self.detokenizer(skip_special_tokens)
        return "".join([*map(detokenizer.feed, ids), detokenizer.finish()])

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        return self._vocabulary.detokenizer(skip_special_tokens)

    def surely_over(self, text: str, max_tokens: int) -> bool:
        """Whether the text is over `max_tokens` by its length alone: no token is longer than the
        longest. Saves tokenizing megabytes only to refuse them. Tokenizers that may take any stretch
        of text for one unknown token never say so."""
        model = self._tokenizer.model
        if not (self._vocabulary.is_byte_level or getattr(model, "byte_fallback", False)):
            return False
        shrinking = 1 if self._tokenizer.normalizer is None else 4
        return len(text) > max_tokens * self._longest_token * shrinking


def _read_json(path: Path) -> dict[str, Any]:
    """An absent file reads as empty."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path} holds no JSON object")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in SPECIAL_TOKEN_NAMES:
        token = config.get(name)
        if isinstance(token, dict):  # the long form, with the flags of an added token
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _set_post_processor(tokenizer: Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Where the configuration names add_bos_token or add_eos_token, it overrides tokenizer.json."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos = special.get("bos_token") if config.get("add_bos_token") else None
    eos = special.get("eos_token") if config.get("add_eos_token") else None
    used = []
    for token in filter(None, (bos, eos)):
        token_id = tokenizer.token_to_id(token)
        if token_id is None:
            raise ModelFilesError(f"tokenizer_config.json adds {token!r}, which tokenizer.json does not know")
        used.append((token, token_id))
    pieces = [piece for piece in (bos, "$A", eos) if piece is not None]
    tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=used)


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the template in tokenizer_config.json (the one named `default`
    where there are several)."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelFilesError(f"{file} cannot be read: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
