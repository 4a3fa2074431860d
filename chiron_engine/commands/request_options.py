"""The options of `chiron generate` that describe a request."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from chiron_engine.policy.iteration.sampling_params import SamplingParams

from .option_tables import TableOption, choice

SLO_CLASSES = ("interactive", "batch")


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """None leaves a value to its default, the server's or SamplingParams'."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    slo_class: str | None = None
    ttft_slo_ms: float | None = None
    itl_slo_ms: float | None = None
    timeout: float | None = None

    def sampling_fields(self) -> dict[str, Any]:
        """What was given, by the names of SamplingParams."""
        names = [field.name for field in dataclasses.fields(SamplingParams)]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def sampling_params(self) -> SamplingParams:
        """Raises ValueError for a value outside its range."""
        return SamplingParams(**self.sampling_fields())


def request_options(sampling: Mapping[str, Any], remote: Mapping[str, Any]) -> RequestOptions:
    values = {**sampling, **remote}
    for name in ("stop", "stop_token_ids"):
        values[name] = tuple(values[name] or ())
    values["logit_bias"] = dict(values["logit_bias"] or ()) or None
    return RequestOptions(**values)


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not of the form ID=BIAS, as 15=-100") from None


def _text(value: str) -> str:
    """`@FILE` stands for what is in the file."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {value[1:]}: {error}") from None


def _entry(flag: str, kind: Any, help_text: str, **details: Any) -> tuple[str, TableOption]:
    default = False if kind is bool else None
    return flag[2:].replace("-", "_"), TableOption(flag, kind, default, {"help": help_text, **details})


SAMPLING_OPTIONS = dict(
    (
        _entry("--max-tokens", int | None, "Output tokens, at most (what the context leaves)."),
        _entry("--temperature", float | None, "0 is greedy (1)."),
        _entry("--top-k", int | None, "Keep the k likeliest tokens (all)."),
        _entry("--top-p", float | None, "Keep the likeliest tokens of this mass (1)."),
        _entry("--min-p", float | None, "Keep tokens of this share of the largest probability (all)."),
        _entry("--min-tokens", int | None, "Output tokens before which nothing ends it (0)."),
        _entry("--repetition-penalty", float | None, "Over 1: fewer tokens of prompt and output again (1)."),
        _entry("--presence-penalty", float | None, "Over 0: fewer tokens of the output again (0)."),
        _entry("--frequency-penalty", float | None, "The same, for each time a token was there (0)."),
        _entry(
            "--logit-bias",
            list[str] | None,
            "Add to the logit of a token; may be repeated.",
            parser=_bias,
            metavar="ID=BIAS",
        ),
        _entry("--logprobs", int | None, "With --json: of each token, and of so many of the likeliest."),
        _entry("--prompt-logprobs", int | None, "The same of each token of the prompt but the first."),
        _entry("--json-schema", str | None, "The output is JSON of this schema, or @FILE.", parser=_text),
        _entry("--regex", str | None, "The output is what this matches."),
        _entry("--grammar", str | None, "The output is of this Lark grammar, or @FILE.", parser=_text),
        _entry("--seed", int | None, "Seed of each request (drawn)."),
        _entry("--stop", list[str] | None, "End before this string; may be repeated."),
        _entry("--stop-token-ids", list[int] | None, "End after this token; may be repeated."),
        _entry("--ignore-eos", bool, "Go on after the model's end token."),
    )
)
REMOTE_OPTIONS = dict(
    (
        _entry("--slo-class", str | None, "Service class (interactive).", **choice(SLO_CLASSES)),
        _entry("--ttft-slo-ms", float | None, "Target for the first token."),
        _entry("--itl-slo-ms", float | None, "Target for the gap between tokens."),
        _entry("--timeout", float | None, "Seconds for each request.", min=0.001),
    )
)
