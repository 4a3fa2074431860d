"""tokenizer.json, tokenizer_config.json and the token ids out of a GGUF file's metadata.

Two kinds are read: byte-level BPE ("gpt2"), whose text is first split by the rule that
tokenizer.ggml.pre names, and SentencePiece's BPE ("llama"). Others are refused: a text that is split
in another way than in training still gives tokens, only the wrong ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from chiron_engine.model.gguf_file import GgufFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "\u2581"
# Control tokens that end a turn or a text, whichever of them the file names as eos.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")
_UNSUPPORTED = ("precompiled_charsmap", "remove_extra_whitespaces", "treat_whitespace_as_suffix")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Split:
    """patterns: each splits what the one before has left whole. whole_words: a piece that is a token is
    never put together by merges. bos: whether a text begins with it where the file says nothing. nfc:
    the text is composed to Unicode's NFC before."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False


_LLAMA3 = _Split((_WORDS % r"\p{N}{1,3}",), whole_words=True, bos=True)
_SPLITS = {
    "default": _Split((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Split((_GPT2,)),
    "smollm": _Split((r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Split((_WORDS % r"\p{N}",), nfc=True),
    "deepseek-r1-qwen": _Split((_WORDS % r"\p{N}",)),
}


class GgufTokenizer:
    """A file's tokenizer. rows: the ids that the model has. Raises ModelError, naming the field, for a
    kind that is not known."""

    def __init__(self, file: GgufFile, rows: int) -> None:
        self._file = file
        self._kind = file.text("tokenizer.ggml.model", "")
        self._tokens: list[str] = file.array("tokenizer.ggml.tokens", str)
        if len(self._tokens) > rows:
            raise file.fail(f"has {len(self._tokens)} tokens, but token_embd.weight only {rows} rows")
        if len(set(self._tokens)) != len(self._tokens):
            raise file.fail("tokenizer.ggml.tokens has a token twice, which is not supported")
        self._kinds: list[int] = [_NORMAL] * len(self._tokens)
        if "tokenizer.ggml.token_type" in file:
            self._kinds = file.array("tokenizer.ggml.token_type", int, len(self._tokens))
        for name in _UNSUPPORTED:
            if file.value(f"tokenizer.ggml.{name}"):
                raise file.fail(f"tokenizer.ggml.{name} is set, which is not supported")
        if self._kind not in ("gpt2", "llama"):
            raise file.fail(f"tokenizer.ggml.model {self._kind!r} is not supported, only gpt2 and llama")
        self._split = self._find_split() if self._kind == "gpt2" else None
        self._named = {
            "bos": self._id("bos", 1),
            "eos": self._id("eos", 2),
            "unk": self._id("unknown", 0),
            "pad": self._id("padding"),
        }

    def token_ids(self) -> dict[str, Any]:
        """bos_token_id, pad_token_id and eos_token_id as config.json has them; those that are known."""
        ids: dict[str, Any] = {f"{name}_token_id": self._named[name] for name in ("bos", "pad")}
        ends = self._ends()
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        return {name: value for name, value in ids.items() if value is not None}

    def config(self, context: int) -> dict[str, Any]:
        """tokenizer_config.json. context: the longest text, in tokens."""
        file = self._file
        usual = self._split is None or self._split.bos
        bos = file.flag("tokenizer.ggml.add_bos_token", usual) and self._named["bos"] is not None
        eos = file.flag("tokenizer.ggml.add_eos_token", False) and self._named["eos"] is not None
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "add_bos_token": bos,
            "add_eos_token": eos,
            **{f"{name}_token": self._tokens[i] for name, i in self._named.items() if i is not None},
        }
        if "tokenizer.chat_template" in file:
            config["chat_template"] = file.text("tokenizer.chat_template")
        return config

    def build(self) -> Tokenizer:
        try:
            tokenizer = self._sentencepiece() if self._split is None else self._byte_level(self._split)
        except Exception as error:  # the Rust side raises plain Exception, for a merge of no tokens say
            raise self._file.fail(f"its vocabulary and merges form no tokenizer: {error}") from None
        self._mark_special(tokenizer)
        return tokenizer

    def _find_split(self) -> _Split:
        name = self._file.text("tokenizer.ggml.pre", "")
        if name not in _SPLITS:
            raise self._file.fail(
                f"tokenizer.ggml.pre {name!r} is not supported, only {', '.join(_SPLITS)}: "
                "text would be split in another way than in training"
            )
        if self._file.flag("tokenizer.ggml.add_space_prefix", False):
            raise self._file.fail("tokenizer.ggml.add_space_prefix is not supported for gpt2")
        return _SPLITS[name]

    def _id(self, name: str, default: int | None = None) -> int | None:
        """A special token's id. default: what it is where a SentencePiece file does not say."""
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self._file:
            return default if self._kind == "llama" else None
        value = self._file.integer(key)
        if not 0 <= value < len(self._tokens):
            raise self._file.fail(f"{key} is {value}, outside the vocabulary [0, {len(self._tokens)})")
        return value

    def _ends(self) -> list[int]:
        named = [self._named["eos"], self._id("eot"), self._id("eom")]
        ends = [i for i in named if i is not None]
        for i, (token, kind) in enumerate(zip(self._tokens, self._kinds, strict=True)):
            # What stands for unknown text is no end, whatever it is called (SmolLM2's <|endoftext|>).
            if kind == _CONTROL and token in _ENDS and i != self._named["unk"]:
                ends.append(i)
        return list(dict.fromkeys(ends))

    def _byte_level(self, split: _Split) -> Tokenizer:
        merges = [tuple(merge.split(" ")) for merge in self._file.array("tokenizer.ggml.merges", str)]
        vocabulary = {token: i for i, token in enumerate(self._tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.whole_words))
        if split.nfc:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentencepiece(self) -> Tokenizer:
        """BPE over characters, bytes for those that are no token, spaces written as U+2581."""
        unknown = self._named["unk"]
        vocabulary = {token: i for i, token in enumerate(self._tokens)}
        model = models.BPE(
            vocabulary,
            self._scored_merges(vocabulary),
            unk_token=None if unknown is None else self._tokens[unknown],
            fuse_unk=True,
            byte_fallback=self._kinds.count(_BYTE) == 256,
        )
        prefixed = self._file.flag("tokenizer.ggml.add_space_prefix", True)
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence(
            [*([normalizers.Prepend(_SPACE)] if prefixed else []), normalizers.Replace(" ", _SPACE)]
        )
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
        return tokenizer

    def _scored_merges(self, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
        """SentencePiece has no merges but a score for each token: any two neighbours that form a
        token are merged, the highest score first."""
        from transformers.tokenization_utils_base import generate_merges

        scores = self._file.array("tokenizer.ggml.scores", (int, float), len(self._tokens))
        kinds = zip(self._tokens, self._kinds, strict=True)
        other = {token for token, kind in kinds if kind != _NORMAL}
        merges: list[tuple[str, str]] = generate_merges(
            vocabulary, dict(zip(self._tokens, scores, strict=True)), skip_tokens=other
        )
        merged = {left + right for left, right in merges}
        if len({scores[vocabulary[token]] for token in merged}) < len(merged):
            # Equal scores are merged from the left, which ranked merges cannot say.
            raise self._file.fail("tokenizer.ggml.scores has equal scores, which are not supported")
        return merges

    def _mark_special(self, tokenizer: Tokenizer) -> None:
        """Tokens that are found in a text as they are; control tokens are left out of decoded text."""
        for kinds, special in (((_CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
            pairs = zip(self._tokens, self._kinds, strict=True)
            found = [AddedToken(t, special=special, normalized=False) for t, kind in pairs if kind in kinds]
            if special:
                tokenizer.add_special_tokens(found)
            else:
                tokenizer.add_tokens(found)
