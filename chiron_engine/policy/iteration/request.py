"""What one engine knows of a request: its parameters, its tokens and where it stands."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .plan import TokenLogprobs


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


@dataclass(slots=True, eq=False)
class Request:
    """One request inside one engine. Plain and mutable: it is touched on the step path.

    The scheduler owns every field below the first group; others only read them. But one that other
    engines evicted before is added with `num_preempted` as it was there.
    guide: what its executor made of `sampling.guide`.
    `num_prior_outputs` of the last tokens of `prompt_ids` are output of its own that other engines made.
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
    guide: object = None
    num_prior_outputs: int = 0

    state: RequestState = RequestState.WAITING
    output_ids: array[int] = field(default_factory=lambda: array("I"))
    slot: int = -1
    num_preempted: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    first_scheduled: float | None = None
    first_token: float | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Those committed, until its first token takes them along."""

    blocks: list[int] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)
    block_keys: list[Hashable] = field(default_factory=list)
    """Of its full blocks, as far as they can be found. A caller may put keys of the prompt's first
    blocks here beforehand, equal for equal content and prefix."""
    key_owner: int = -1
    """Names its private block keys; -1 while it has none."""
    num_computed: int = 0
    """While its prompt is computed in chunks: tokens whose KV is planned."""
    num_scored: int = 0
    """First tokens of its prompt whose successors' log probabilities are planned or told."""
    num_planned_outputs: int = 0
    """Output tokens planned before it began to decode (each later step adds one)."""
    decode_since: int = -1
    """Step at which it began to decode; -1 while it does not."""
    promised_blocks: int = 0
    """Blocks it is expected to reach, as counted by admission."""

    @property
    def num_to_score(self) -> int:
        """Tokens of its prompt whose successors' log probabilities it asks for: all but the last."""
        if self.sampling.prompt_logprobs is None:
            return 0
        return len(self.prompt_ids) - self.num_prior_outputs - 1

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
