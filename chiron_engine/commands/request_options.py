"""The options of `chiron generate` that describe a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chiron_engine.policy.iteration.request import SamplingParams

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
    slo_class: str | None = None
    ttft_slo_ms: float | None = None
    itl_slo_ms: float | None = None
    timeout: float | None = None

    def sampling_params(self) -> SamplingParams:
        """Raises ValueError for a value outside its range."""
        given = {
            name: getattr(self, name)
            for name in ("max_tokens", "temperature", "top_k", "top_p", "seed")
            if getattr(self, name) is not None
        }
        return SamplingParams(**given, stop_token_ids=self.stop_token_ids, ignore_eos=self.ignore_eos)


def request_options(sampling: Mapping[str, Any], remote: Mapping[str, Any]) -> RequestOptions:
    values = {**sampling, **remote}
    for name in ("stop", "stop_token_ids"):
        values[name] = tuple(values[name] or ())
    return RequestOptions(**values)


def _entry(flag: str, kind: Any, help_text: str, **details: Any) -> tuple[str, TableOption]:
    default = False if kind is bool else None
    return flag[2:].replace("-", "_"), TableOption(flag, kind, default, {"help": help_text, **details})


SAMPLING_OPTIONS = dict(
    (
        _entry("--max-tokens", int | None, "Output tokens, at most (what the context leaves)."),
        _entry("--temperature", float | None, "0 is greedy (1)."),
        _entry("--top-k", int | None, "Keep the k likeliest tokens (all)."),
        _entry("--top-p", float | None, "Keep the likeliest tokens of this mass (1)."),
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
