"""Token ids and ends of output for engines without a model.

Each token is a hash of the token before it, its position and the request's seed. So an output is a
function of prompt and seed, and a request that goes on elsewhere, sent with all its tokens so far,
continues it: where a token were lost or doubled on the way, everything after it would differ.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, exp, log, pi, sqrt

from chiron_engine.policy.iteration.plan import StepPlan
from chiron_engine.policy.iteration.request import Request

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_NO_END = 1 << 62


def _mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True, slots=True)
class OutputLengths:
    """Lognormal lengths of outputs, in tokens. The defaults are those of the Azure conversation trace of
    2023: mean of the logarithm 5.02, deviation 0.86."""

    median: float = 151.0
    sigma: float = 0.86

    def draw(self, bits: int) -> int:
        """The length for 64 random bits, at least 1."""
        first = ((bits >> 32) + 0.5) * 2.0**-32
        second = (bits & 0xFFFFFFFF) * 2.0**-32
        normal = sqrt(-2.0 * log(first)) * cos(2.0 * pi * second)  # Box and Muller 1958
        return max(1, round(self.median * exp(self.sigma * normal)))


class SimulatedTokens:
    """The tokens of every step's requests. Tokens are never `eos_token_id`, but where an output ends.

    A request whose stop ids hold `eos_token_id` ends after a length drawn from `lengths` by its seed and
    the place where its output begins. That place is found in the tokens themselves: before it stands
    the last token that does not follow from the one before it. (One prompt in vocab_size ends in a token
    that happens to follow; its output then counts as begun there, wherever it goes on.)

    Raises ValueError for a vocabulary of under two tokens, or an `eos_token_id` outside it.
    """

    def __init__(
        self, vocab_size: int, eos_token_id: int, max_slots: int, lengths: OutputLengths | None = None
    ) -> None:
        if vocab_size < 2 or not 0 <= eos_token_id < vocab_size:
            raise ValueError(f"a vocabulary of {vocab_size} tokens with end token {eos_token_id}")
        self._vocab_size = vocab_size
        self._eos = eos_token_id
        self._lengths = lengths if lengths is not None else OutputLengths()
        self._ends = array("q", [_NO_END]) * max_slots

    def of_step(self, plan: StepPlan) -> list[int]:
        """Tokens in the order of the plan's samples. Call once for each plan, with all earlier steps
        committed."""
        for joined in plan.joined:
            request = joined.request
            ends = self._eos in request.stop_ids
            self._ends[joined.slot] = self._end(request) if ends else _NO_END
        tokens = [self._next(request) for request in (*plan.decode.requests, *plan.sampled_requests)]
        for draft, request in zip(plan.drafts, plan.draft_requests, strict=True):
            tokens += [self._after(request, p, t) for p, t in enumerate(draft.tokens, draft.start + 1)]
        return tokens

    def output(self, prompt_ids: Sequence[int], seed: int, count: int) -> list[int]:
        """The first `count` tokens of a request that goes on for so long, wherever it runs."""
        tokens = list(prompt_ids)
        for position in range(len(tokens), len(tokens) + count):
            tokens.append(self._follower(seed, position, tokens[-1]))
        return tokens[len(prompt_ids) :]

    def _next(self, request: Request) -> int:
        outputs = request.output_ids
        position = len(request.prompt_ids) + len(outputs)
        return self._after(request, position, outputs[-1] if outputs else request.prompt_ids[-1])

    def _after(self, request: Request, position: int, before: int) -> int:
        """Of a request, the token at `position`, after the token `before`."""
        if position >= self._ends[request.slot]:
            return self._eos
        return self._follower(request.seed, position, before)

    def _follower(self, seed: int, position: int, before: int) -> int:
        """The token at `position`, after the token `before`."""
        state = _mix((seed + _GOLDEN * (position + 1)) & _MASK)
        token = _mix(state ^ before) % (self._vocab_size - 1)
        return token + 1 if token >= self._eos else token

    def _end(self, request: Request) -> int:
        """Position of the request's end token."""
        tokens: Sequence[int] = [*request.prompt_ids, *request.output_ids]
        begin = len(tokens)
        while begin > 1 and tokens[begin - 1] == self._follower(request.seed, begin - 1, tokens[begin - 2]):
            begin -= 1
        return begin + self._lengths.draw(_mix(_mix(request.seed ^ begin) ^ tokens[begin - 1])) - 1
