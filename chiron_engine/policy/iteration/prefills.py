"""Running requests whose known tokens are not all computed yet, and the chunks they are computed in."""

from __future__ import annotations

from collections.abc import Iterator

from .kv_tiers import KvTiers
from .plan import Chunk, StepPlan
from .request import Request, SloClass

SCORED_TOKENS = 128
"""Of a step, at most."""


class Prefills:
    """By class, in order of joining. tokens_left: of each class, the tokens to compute in all."""

    __slots__ = ("_by_class", "_scored", "_tiers", "tokens_left")

    def __init__(self, tiers: KvTiers) -> None:
        self._tiers = tiers
        self._by_class: list[dict[Request, None]] = [{} for _ in SloClass]
        self._scored: dict[Request, None] = {}
        self.tokens_left = [0] * len(SloClass)

    def __contains__(self, request: Request) -> bool:
        return request in self._by_class[request.slo.slo_class]

    def __iter__(self) -> Iterator[Request]:
        for requests in self._by_class:
            yield from requests

    def start(self, request: Request, known: int) -> None:
        """It has `known` tokens, the first `num_computed` of them computed."""
        slo_class = request.slo.slo_class
        self._by_class[slo_class][request] = None
        self.tokens_left[slo_class] += known - request.num_computed
        if request.num_scored < request.num_to_score:
            self._scored[request] = None

    def stop(self, request: Request, step: int) -> None:
        """It leaves with tokens still to compute."""
        slo_class = request.slo.slo_class
        del self._by_class[slo_class][request]
        self.tokens_left[slo_class] -= request.tokens_at(step) - request.num_computed
        self._scored.pop(request, None)

    def ahead_of(self, slo_class: SloClass) -> int:
        """Tokens that are computed before those of a newcomer of this class, those left out that no step
        may take yet."""
        interactive, batch = self._takeable(SloClass.INTERACTIVE), self._takeable(SloClass.BATCH)
        return interactive + batch if slo_class is SloClass.BATCH else interactive

    def advance(self, budget: int, plan: StepPlan) -> None:
        """Plan chunks of at most `budget` tokens in all: interactive requests first, within a class in
        order of joining. `take_complete` is to follow. Of requests whose prompt is scored they are at most
        SCORED_TOKENS in all: each takes a row of logits."""
        to_score = SCORED_TOKENS
        for slo_class, requests in enumerate(self._by_class):
            if not requests or budget <= 0:
                continue
            before = budget
            for request in requests:
                if budget <= 0:
                    break
                is_scored = request.num_scored < request.num_to_score
                if is_scored and not to_score:
                    continue
                count = self._advance(request, min(budget, to_score) if is_scored else budget, plan)
                budget -= count
                to_score -= count if is_scored else 0
            self.tokens_left[slo_class] -= before - budget

    def take_complete(self, plan: StepPlan) -> list[Request]:
        """Take out those whose last known token the plan computes."""
        complete = [r for c, r in zip(plan.chunks, plan.chunk_requests, strict=True) if c.samples]
        for request in complete:
            del self._by_class[request.slo.slo_class][request]
            self._scored.pop(request, None)
        return complete

    def is_idle(self) -> bool:
        """Nothing is counted for anybody. For tests."""
        return not (any(self._by_class) or any(self.tokens_left) or self._scored)

    def _takeable(self, slo_class: SloClass) -> int:
        left = self.tokens_left[slo_class]
        if not self._scored:
            return left
        # Known tokens grow only while a request decodes: any step will do.
        scored = sum(r.tokens_at(0) - r.num_computed for r in self._scored if r.slo.slo_class is slo_class)
        return left - scored + min(scored, SCORED_TOKENS)

    def _advance(self, request: Request, budget: int, plan: StepPlan) -> int:
        """Plan the next chunk, of at most `budget` tokens; returns how many."""
        known = request.tokens_at(plan.step)
        start = request.num_computed
        count = min(known - start, budget)
        end = start + count
        request.num_computed = end
        self._tiers.seal(request, start, end)
        chunk = Chunk(request.slot, start, count, samples=end == known)
        plan.chunks.append(chunk)
        if request.num_scored < min(end, request.num_to_score):
            chunk.score_from = request.num_scored
            chunk.score_to = request.num_scored = min(end, request.num_to_score)
        plan.chunk_requests.append(request)
        plan.prefill_tokens += count
        plan.prefill_context += count * end
        return count
