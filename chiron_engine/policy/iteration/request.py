"""What one engine knows of a request: its parameters, its tokens and where it stands."""

from __future__ import annotations

import math
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from numbers import Integral, Real


class SloClass(IntEnum):
    """Service class of a request; the lower value is served first."""

    INTERACTIVE = 0
    BATCH = 1


class RequestState(Enum):
    """EVICTED: handed back by an engine that keeps what it saved of it, until it is added again or
    forgotten. LEFT: taken out of its engine for good, without an end."""

    WAITING = "waiting"
    RUNNING = "running"
    EVICTED = "evicted"
    LEFT = "left"
    FINISHED = "finished"


ENDED = (RequestState.FINISHED, RequestState.LEFT)


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objective of one request. Durations in seconds; `deadline` on the engine's clock."""

    slo_class: SloClass = SloClass.INTERACTIVE
    ttft_s: float = 10.0
    itl_s: float = 0.2
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k likeliest tokens (0 keeps all). top_p: keep the smallest set with this mass.
    seed: sampling is a function of (seed, position) only; None lets the engine draw a seed.
    max_tokens: None means as many as the context allows.
    stop_token_ids: these end the output (and are its last token); ignore_eos leaves the model's
    own end tokens out.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            _require(name, getattr(self, name), Real, "a number")
        for name in ("top_k", "seed", "max_tokens"):
            value = getattr(self, name)
            if value is not None or name == "top_k":
                _require(name, value, Integral, "a whole number")
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise ValueError(f"temperature is {self.temperature}; it must be between 0 and 100")
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise ValueError(f"top_p is {self.top_p}; it must be over 0 and at most 1")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all) or a positive number")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be between 0 and 2**64 - 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(
                f"{len(self.stop_token_ids)} stop_token_ids; at most {MAX_STOP_TOKEN_IDS} are allowed"
            )


MAX_STOP_TOKEN_IDS = 128


def _require(name: str, value: object, kind: type, what: str) -> None:
    """A fractional max_tokens would never be met, and a request would outgrow its block table."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be {what}")


GREEDY = SamplingParams(temperature=0.0)


@dataclass(slots=True, eq=False)
class Request:
    """One request inside one engine. Plain and mutable: it is touched on the step path.

    The scheduler owns every field below the first group; others only read them. But one that other
    engines evicted before is added with `num_preempted` as it was there.
    `output_ids` holds the tokens committed so far. With an executor that yields no token values
    (the latency model) it stays empty and only `num_planned_outputs` counts.
    """

    request_id: int
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    slo: Slo = Slo()
    seed: int = 0
    arrival: float = 0.0
    cache_salt: bytes = b""
    client: object = None

    state: RequestState = RequestState.WAITING
    output_ids: array[int] = field(default_factory=lambda: array("I"))
    slot: int = -1
    num_preempted: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    first_scheduled: float | None = None
    first_token: float | None = None

    blocks: list[int] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)
    block_keys: list[Hashable] = field(default_factory=list)
    """Of its full blocks, as far as they can be found. A caller may put keys of the prompt's first
    blocks here beforehand, equal for equal content and prefix."""
    key_owner: int = -1
    """Names its private block keys; -1 while it has none."""
    num_computed: int = 0
    """While its prompt is computed in chunks: tokens whose KV is planned."""
    num_planned_outputs: int = 0
    """Output tokens planned before it began to decode (each later step adds one)."""
    decode_since: int = -1
    """Step at which it began to decode; -1 while it does not."""
    promised_blocks: int = 0
    """Blocks it is expected to reach, as counted by admission."""

    def outputs_at(self, step: int) -> int:
        """Output tokens that the steps planned before `step` produce."""
        if self.decode_since < 0:
            return self.num_planned_outputs
        return self.num_planned_outputs + step - self.decode_since

    def tokens_at(self, step: int) -> int:
        """Tokens known to the steps planned from `step` on: prompt and outputs."""
        since = self.decode_since
        tokens = len(self.prompt_ids) + self.num_planned_outputs
        return tokens if since < 0 else tokens + step - since
