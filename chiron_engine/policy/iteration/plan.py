"""The step plan: what changed since the last step, and nothing of what did not.

Decoding requests that stay need no entry: each advances by one token. Within a step the executor
keeps this order: copies out, copies in, then the forward pass. Steps run in the order planned, so
a block freed by one plan may be given away by the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .request import Request, SloClass


@dataclass(slots=True, eq=False)
class Joined:
    """A request that takes a slot: new, or resumed after a preemption.

    token_ids: every known token (prompt, then output committed so far); None where the executor
    needs no values. The first `num_computed` of them have their KV in `blocks` already (after
    this step's copies in); the rest arrives as chunks.
    """

    slot: int
    request: Request
    token_ids: Sequence[int] | None
    num_computed: int
    blocks: list[int]


@dataclass(slots=True, eq=False)
class Chunk:
    """Known tokens [start, start + count) of the request in `slot` to compute in this step.

    With `samples` the chunk reaches the last known token: its logits give the next token, and
    the slot decodes from the next step on. [score_from, score_to): those of its tokens whose logits are
    wanted for the log probability of the prompt's token after them.
    """

    slot: int
    start: int
    count: int
    samples: bool
    score_from: int = 0
    score_to: int = 0


@dataclass(slots=True, eq=False)
class Draft:
    """The request in `slot`, which decodes, computes its last known token, at position `start`, and
    guesses of those that follow it: `tokens` is all of them, in order.

    Every one of them is sampled after, each with the key of its own position. So the tokens that
    hold are those which decoding one by one would have brought (`drafts.num_verified`).
    """

    slot: int
    start: int
    tokens: Sequence[int]

    @property
    def count(self) -> int:
        """Rows of the step, one for each token."""
        return len(self.tokens)


@dataclass(slots=True, eq=False)
class Grown:
    """`block` becomes entry `index` of the block table of `slot`."""

    slot: int
    index: int
    block: int


@dataclass(slots=True, eq=False)
class BlockCopy:
    """One block copied between the device pool and the host pool; the direction is the list's."""

    device: int
    host: int


@dataclass(slots=True, eq=False)
class DecodeBatch:
    """The requests that decode one token each. The same object for as long as nothing changes,
    so an executor may keep what it derived from it. num_interactive: how many of them are."""

    requests: tuple[Request, ...] = ()
    slots: tuple[int, ...] = ()
    num_interactive: int = 0


NO_DECODES = DecodeBatch()


@dataclass(slots=True, eq=False)
class StepPlan:
    """One step. Sampled rows are ordered: `decode` in its order, then the chunks with `samples`, then
    all rows of `drafts`.

    left: slots given back since the last plan; applied first (a slot may appear here and in `joined`).
    chunk_requests: the request of each chunk, in order. final: requests whose last token, by
    length, this step samples. preempted: requests this plan took off the device.
    decode_context: sum over decoding requests of the KV length each attends to (its own token
    included). prefill_tokens: sum of the chunk counts. prefill_context: sum over chunks of
    count x KV length at the chunk's end. All three feed the latency model.
    drafts: requests that decode with guesses, none of them in `decode`; draft_requests: in order.
    draft_context: sum of their KV lengths, without the guesses.
    """

    step: int
    decode: DecodeBatch = NO_DECODES
    chunks: list[Chunk] = field(default_factory=list)
    chunk_requests: list[Request] = field(default_factory=list)
    joined: list[Joined] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    grown: list[Grown] = field(default_factory=list)
    copies_out: list[BlockCopy] = field(default_factory=list)
    copies_in: list[BlockCopy] = field(default_factory=list)
    final: list[Request] = field(default_factory=list)
    decode_context: int = 0
    prefill_tokens: int = 0
    prefill_context: int = 0
    preempted: list[Request] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    draft_requests: list[Request] = field(default_factory=list)
    draft_context: int = 0

    @property
    def sampled_requests(self) -> list[Request]:
        """Those whose chunks sample."""
        return [r for c, r in zip(self.chunks, self.chunk_requests, strict=True) if c.samples]

    @property
    def drafted_tokens(self) -> int:
        """Guesses computed."""
        return sum([draft.count - 1 for draft in self.drafts])

    @property
    def is_empty(self) -> bool:
        """Nothing to compute and nothing to copy: the executor need not see this plan."""
        return not (self.decode.slots or self.chunks or self.drafts or self.copies_out or self.copies_in)


@dataclass(slots=True, eq=False)
class TokenLogprobs:
    """Natural logarithms of what the model gave a token and the likeliest ones, those first. rank: 1 for the
    likeliest; of tokens of prompts."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]
    rank: int | None = None


@dataclass(slots=True, eq=False)
class StepOutput:
    """What a committed step brought: tokens[i] is a new token of requests[i] (None where the executor
    models no values); a request whose guesses held is there several times, its tokens in order. The
    requests that finished carry their `finish_reason`. handed_back:
    evicted requests that have left the engine, what was saved of them still on its host tier.
    logprobs: by request id, of those tokens for which they are asked. prompt_logprobs: the same, of all
    tokens of a prompt but the first, with its first new token. accepted: guesses that held, by class."""

    step: int
    requests: Sequence[Request] = ()
    tokens: list[int] | None = None
    finished: list[Request] = field(default_factory=list)
    handed_back: list[Request] = field(default_factory=list)
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)
    accepted: list[int] = field(default_factory=lambda: [0] * len(SloClass))


@dataclass(slots=True, eq=False)
class StepResult:
    """What an executor returns for one plan.

    tokens: one id per sampled row in the plan's order, or None from an executor that models only
    time; that one says in `stopped` which requests ended with this step's token. device_s: seconds
    the step took on the device. logprobs: by number of the sampled row, where they are asked for.
    prompt_logprobs: by number of the chunk, of the tokens after those it scores.
    """

    tokens: list[int] | None
    device_s: float = 0.0
    graph: bool = False
    stopped: Sequence[Request] = ()
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)
