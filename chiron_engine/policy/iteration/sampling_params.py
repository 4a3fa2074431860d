"""How the tokens of one request are chosen, as its client asks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import NamedTuple

MAX_STOP_TOKEN_IDS = 128
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 1 << 18
MAX_GUIDE_CHARS = 1 << 16
GUIDE_KINDS = ("json_schema", "regex", "grammar")


@dataclass(frozen=True, slots=True)
class Range:
    """least and most are in it; above: a bound that is not."""

    most: float
    least: float = -math.inf
    above: float = -math.inf

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.least <= value <= self.most and value > self.above

    def __str__(self) -> str:
        if self.above > -math.inf:
            return f"over {self.above:g} and at most {self.most:g}"
        return f"between {self.least:g} and {self.most:g}"


NUMBERS = {
    "temperature": Range(100.0, least=0.0),
    "top_p": Range(1.0, above=0.0),
    "min_p": Range(1.0, least=0.0),
    "repetition_penalty": Range(100.0, above=0.0),
    "presence_penalty": Range(2.0, least=-2.0),
    "frequency_penalty": Range(2.0, least=-2.0),
}
BIAS = Range(100.0, least=-100.0)


class Guide(NamedTuple):
    """What the text of an output must be. kind: json_schema, regex or grammar."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """In the order in which they apply.

    logit_bias: added to the logits of these token ids.
    min_tokens: until the output has so many, neither a token that ends it is chosen nor a stop string
    looked for.
    repetition_penalty: logits of tokens in prompt and output are divided by it where positive, else
    multiplied. frequency_penalty: taken off for each time a token is in the output. presence_penalty:
    taken off once for a token in the output.
    temperature: 0 is greedy; otherwise logits are divided by it.
    min_p: keep tokens of at least this share of the likeliest one's probability.
    top_k: keep the k likeliest tokens (0 keeps all). top_p: keep the smallest set with this mass.
    seed: sampling is a function of (seed, position) only; None lets the engine draw a seed.
    max_tokens: None means as many as the context allows.
    stop_token_ids: these end the output (and are its last token); ignore_eos leaves the model's
    own end tokens out.
    logprobs: tell for each token how likely the model had it, before all of the above, and so many of the
    likeliest ones; None tells nothing.
    prompt_logprobs: the same for each token of the prompt but the first, given those before it.
    json_schema, regex, grammar (in Lark's notation): at most one of them. No token is chosen that leads
    away from it, and the output ends where it is complete.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in NUMBERS.items():
            _check_number(name, getattr(self, name), allowed)
        for name in ("top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None or name in ("top_k", "min_tokens"):
                _require(name, value, Integral, "a whole number")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all) or a positive number")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be between 0 and 2**64 - 1")
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            if asked is not None and not 0 <= asked <= MAX_LOGPROBS:
                raise ValueError(f"{name} is {asked}; it must be between 0 and {MAX_LOGPROBS}")
        self._check_lengths()
        self._check_biases()
        self._check_guide()

    @property
    def guide(self) -> Guide | None:
        given = ((kind, getattr(self, kind)) for kind in GUIDE_KINDS)
        return next((Guide(kind, text) for kind, text in given if text is not None), None)

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def check_prompt_length(self, prompt_tokens: int) -> None:
        """Raises ValueError where more of the prompt's logarithms are wanted than a message is to hold."""
        if self.prompt_logprobs is None:
            return
        numbers = prompt_tokens * (1 + self.prompt_logprobs)
        if numbers > MAX_PROMPT_LOGPROBS:
            raise ValueError(
                f"prompt_logprobs is {self.prompt_logprobs} and the prompt has {prompt_tokens} tokens; "
                f"(prompt_logprobs + 1) x tokens must be at most {MAX_PROMPT_LOGPROBS}"
            )

    def _check_lengths(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens is {self.min_tokens}; it must be 0 or more")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, which is {self.max_tokens}"
            )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(
                f"{len(self.stop_token_ids)} stop_token_ids; at most {MAX_STOP_TOKEN_IDS} are allowed"
            )

    def _check_biases(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers")
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(
                f"logit_bias has {len(self.logit_bias)} tokens; at most {MAX_BIASES} are allowed"
            )
        for token, bias in self.logit_bias.items():
            _require("a token of logit_bias", token, Integral, "a whole number")
            _check_number(f"logit_bias[{token}]", bias, BIAS)

    def _check_guide(self) -> None:
        given = [kind for kind in GUIDE_KINDS if getattr(self, kind) is not None]
        if not given:
            return
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are given; an output follows one of them")
        kind, text = given[0], getattr(self, given[0])
        _require(kind, text, str, "text")
        if not 1 <= len(text) <= MAX_GUIDE_CHARS:
            raise ValueError(f"{kind} has {len(text)} characters; 1 to {MAX_GUIDE_CHARS} are allowed")
        if self.ignore_eos or self.min_tokens:
            other = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise ValueError(f"{other} does not go with {kind}, which says where the output may end")


def _check_number(name: str, value: object, allowed: Range) -> None:
    _require(name, value, Real, "a number")
    if value not in allowed:  # type: ignore[operator]
        raise ValueError(f"{name} is {value}; it must be {allowed}")


def _require(name: str, value: object, kind: type, what: str) -> None:
    """A fractional max_tokens would never be met, and a request would outgrow its block table."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be {what}")


GREEDY = SamplingParams(temperature=0.0)
