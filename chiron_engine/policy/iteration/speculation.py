"""Whether guesses at the tokens to come pay: who gets any in a step, and how many.

A step with guesses takes longer and brings more tokens. Its seconds come from a model of the step and of
what guesses add to it, both learned as it runs, the tokens from the share of guesses that held. Guesses
are computed where the tokens they are expected to bring would take longer to decode one by one, by a
MARGIN. Shares are learned without computing any (`acceptance`); seconds are not. So where guesses are
declined for theirs, one request gets some now and then, ever more seldom, and where every step has some,
one now and then has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .acceptance import Acceptance
from .autoscaler_inputs import EngineCapacity
from .draft_costs import DraftCosts
from .drafts import may_draft
from .prompt_lookup import PromptLookup
from .request import Request
from .step_costs import StepCosts
from .step_model import StepModel
from .step_stats import StepStats

MARGIN = 1.5
"""Of the time that guesses save over the time they take: of many offers those are chosen that look better
than they are, by what is not known of them."""
LEAST_PROBE_GAIN = 0.5
"""Tokens that a probe is expected to bring."""
PROBE_STEPS = 64
MOST_PROBE_STEPS = 1024
"""Steps declined between probes, at first and at most."""
DRAFTED_STEPS = 32
"""Steps with guesses in a row: what steps without take is to stay known."""
REQUESTS_PER_REST = 4
"""Of those that decode, for one step without looking after one that found nothing."""
MOST_BIAS = 0.2
"""Relative error that the model may have on average, of steps that only decode."""
FIRST_BIAS = 0.5
BIAS_SMOOTHING = 0.1
"""Weight of a step in that average: noise is let through for an eighth or so."""


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step computes without guesses, as in `StepModel`; requests > 0 decode."""

    requests: int
    kv_tokens: int
    prompt_tokens: int
    prompt_context: int


@dataclass(slots=True, eq=False)
class Guesses:
    """chances: of each token to hold with all before it."""

    request: Request
    tokens: list[int]
    chances: list[float]

    @property
    def gain(self) -> float:
        """Tokens they are expected to bring."""
        return sum(self.chances)

    def copy(self) -> Guesses:
        return Guesses(self.request, list(self.tokens), list(self.chances))

    def cut(self, count: int) -> None:
        del self.tokens[count:], self.chances[count:]


class _Followed:
    """What is known of one request that decodes: its tokens, and how often guesses at them hold."""

    __slots__ = ("acceptance", "lookup", "num_outputs")

    def __init__(self, request: Request, over: Acceptance) -> None:
        self.lookup = PromptLookup([*request.prompt_ids, *request.output_ids])
        self.acceptance = Acceptance(over)
        self.num_outputs = len(request.output_ids)

    def catch_up(self, request: Request) -> None:
        """Take in its new tokens, and judge by them what was guessed, or would have been."""
        new = request.output_ids[self.num_outputs :]
        if not new:
            return
        lookup, length = self.lookup, self.lookup.length
        for number, guess in enumerate(lookup.guess(len(new))):
            self.acceptance.observe(length + number, guess == new[number])
            if guess != new[number]:
                break
        lookup.extend(new)
        self.num_outputs += len(new)


class Speculation:
    """Of one engine. most: guesses for one request in a step. num_drafted, num_accepted: guesses computed,
    and those that held."""

    def __init__(self, most: int, capacity: EngineCapacity, prior: StepCosts | None = None) -> None:
        """prior: of steps, where known. Raises ValueError unless most > 0."""
        if most < 1:
            raise ValueError(f"num_speculative_tokens is {most}; it must be at least 1 to guess")
        self.num_drafted = 0
        self.num_accepted = 0
        self._most = most
        self._model = StepModel(capacity, prior)
        self._costs = DraftCosts(prior.per_prompt_token_s if prior is not None else 0.0)
        self._acceptance = Acceptance()
        self._followed: dict[Request, _Followed | None] = {}
        self._probe_steps = PROBE_STEPS
        self._declined = 0
        self._drafted_steps = 0
        self._rest = 0
        self._bias = FIRST_BIAS

    def on_step(self, stats: StepStats) -> None:
        """A step was committed."""
        self.num_drafted += stats.drafted_tokens
        self.num_accepted += stats.accepted_tokens
        seconds = stats.itl_s or stats.device_s
        if seconds <= 0.0 or stats.swap_in_blocks or stats.swap_out_blocks:
            return
        if stats.drafted_tokens:
            plain_s = self._model.seconds(
                stats.decode_requests, stats.kv_tokens, stats.prefill_tokens, stats.prefill_context
            )
            self._costs.observe(stats.draft_requests, stats.drafted_tokens, seconds - plain_s, plain_s)
            return
        expected = self._model.observe(stats, seconds)
        if expected and not stats.prefill_tokens:
            error = max(-1.0, min(seconds / expected - 1.0, 1.0))
            self._bias += BIAS_SMOOTHING * (error - self._bias)

    def forget(self, request: Request) -> None:
        """It does not run any more."""
        self._followed.pop(request, None)

    def choose(self, requests: Iterable[Request], load: StepLoad, room: int) -> list[Guesses]:
        """For a step in which these requests decode, all their tokens known. room: rows at most.

        Looking costs time for each request: where it brought nothing, the next steps of a large batch go
        without; what came meanwhile is caught up with."""
        if self._rest > 0:
            self._rest -= 1
            return []
        chosen = self._choose(requests, load, room)
        if not chosen:
            self._rest = load.requests // REQUESTS_PER_REST
        return chosen

    def _choose(self, requests: Iterable[Request], load: StepLoad, room: int) -> list[Guesses]:
        offers = [guesses for request in requests if (guesses := self._offer(request)) is not None]
        if not offers or room <= 0 or not self._knows_plain(load):
            self._drafted_steps = 0
            return []
        token_s = self._model.seconds(load.requests, load.kv_tokens, 0, 0.0) / load.requests
        likeliest = max(offers, key=lambda guesses: guesses.gain).copy()
        self._cut(offers, token_s)
        offers.sort(key=lambda guesses: guesses.gain, reverse=True)
        chosen = self._worthwhile(offers, token_s, room)
        if chosen:
            self._declined, self._probe_steps = 0, PROBE_STEPS
            self._drafted_steps += 1
            return chosen
        self._drafted_steps = 0
        return self._probe(likeliest, room)

    def is_idle(self) -> bool:
        """Nothing is kept for anybody. For tests."""
        return not self._followed

    def _offer(self, request: Request) -> Guesses | None:
        """All that could be guessed of a request; its last token needs no more, and where the values of
        tokens are not modelled there is nothing to guess from."""
        if not request.output_ids:
            return None
        followed = self._followed.get(request)
        if followed is None:
            if request in self._followed:
                return None
            if not may_draft(request):
                self._followed[request] = None
                return None
            followed = self._followed[request] = _Followed(request, self._acceptance)
        else:
            followed.catch_up(request)
        count = min(self._most, request.max_tokens - len(request.output_ids) - 1)
        tokens = followed.lookup.guess(count)
        if not tokens:
            return None
        return Guesses(request, tokens, followed.acceptance.held(followed.lookup.length, len(tokens)))

    def _knows_plain(self, load: StepLoad) -> bool:
        """Whether it is known what this step and one that only decodes take without guesses."""
        known = self._model.has_seen(load.requests) and self._model.has_seen(
            load.requests + load.prompt_tokens
        )
        return known and abs(self._bias) < MOST_BIAS and self._drafted_steps < DRAFTED_STEPS

    def _cut(self, offers: list[Guesses], token_s: float) -> None:
        """Leave out the guesses at the end that are not worth a row; the first one stays."""
        least = MARGIN * self._costs.seconds(0, 1) / token_s
        for guesses in offers:
            guesses.cut(max(1, sum([chance > least for chance in guesses.chances])))

    def _worthwhile(self, offers: list[Guesses], token_s: float, room: int) -> list[Guesses]:
        """Those of the first offers that save the most time; none where they save none."""
        best, most_saved = 0, 0.0
        rows, gain = 0, 0.0
        for count, guesses in enumerate(offers, 1):
            guesses.cut(room - rows)
            if not guesses.tokens:
                break
            rows += len(guesses.tokens)
            gain += guesses.gain
            saved = gain * token_s - MARGIN * self._costs.seconds(count, rows)
            if saved > most_saved:
                best, most_saved = count, saved
        return offers[:best]

    def _probe(self, best: Guesses, room: int) -> list[Guesses]:
        """All of the best offer, where many steps were declined that had one as good."""
        if best.gain < LEAST_PROBE_GAIN:
            return []
        self._declined += 1
        if self._declined < self._probe_steps:
            return []
        self._declined = 0
        self._probe_steps = min(2 * self._probe_steps, MOST_PROBE_STEPS)
        best.cut(room)
        return [best]
