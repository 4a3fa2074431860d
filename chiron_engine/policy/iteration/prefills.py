"""Running requests whose known tokens are not all computed yet, and the chunks they are computed in."""

from __future__ import annotations

from collections.abc import Iterator

from .kv_tiers import KvTiers
from .plan import Chunk, StepPlan
from .request import Request, SloClass


class Prefills:
    """By class, in order of joining. tokens_left: of each class, the tokens to compute in all."""

    __slots__ = ("_by_class", "_tiers", "tokens_left")

    def __init__(self, tiers: KvTiers) -> None:
        self._tiers = tiers
        self._by_class: list[dict[Request, None]] = [{} for _ in SloClass]
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

    def stop(self, request: Request, step: int) -> None:
        """It leaves with tokens still to compute."""
        slo_class = request.slo.slo_class
        del self._by_class[slo_class][request]
        self.tokens_left[slo_class] -= request.tokens_at(step) - request.num_computed

    def ahead_of(self, slo_class: SloClass) -> int:
        """Tokens that are computed before those of a newcomer of this class."""
        interactive, batch = self.tokens_left
        return interactive + batch if slo_class is SloClass.BATCH else interactive

    def advance(self, budget: int, plan: StepPlan) -> None:
        """Plan chunks of at most `budget` tokens in all: interactive requests first, within a class in
        order of joining. `take_complete` is to follow."""
        for slo_class, requests in enumerate(self._by_class):
            if not requests or budget <= 0:
                continue
            before = budget
            for request in requests:
                if budget <= 0:
                    break
                budget -= self._advance(request, budget, plan)
            self.tokens_left[slo_class] -= before - budget

    def take_complete(self, plan: StepPlan) -> list[Request]:
        """Take out those whose last known token the plan computes."""
        complete = [r for c, r in zip(plan.chunks, plan.chunk_requests, strict=True) if c.samples]
        for request in complete:
            del self._by_class[request.slo.slo_class][request]
        return complete

    def is_idle(self) -> bool:
        """Nothing is counted for anybody. For tests."""
        return not (any(self._by_class) or any(self.tokens_left))

    def _advance(self, request: Request, budget: int, plan: StepPlan) -> int:
        """Plan the next chunk, of at most `budget` tokens; returns how many."""
        known = request.tokens_at(plan.step)
        start = request.num_computed
        count = min(known - start, budget)
        end = start + count
        request.num_computed = end
        self._tiers.seal(request, start, end)
        plan.chunks.append(Chunk(request.slot, start, count, samples=end == known))
        plan.chunk_requests.append(request)
        plan.prefill_tokens += count
        plan.prefill_context += count * end
        return count
