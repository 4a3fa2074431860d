"""Steps with guesses: requests leave the decodes of the step for them, and return with what held.

All tokens are to be known when a step is planned, so at most one step is under way. Blocks that only
guesses need come from those that are free, and what no token that held needs is given back at once: at
the next plan a table is as it would be without guesses. Blocks are sealed as far as tokens held.
"""

from __future__ import annotations

from .decodes import Decodes
from .drafts import end_of
from .kv_admission import KvAdmission
from .kv_tiers import KvTiers
from .plan import Draft, Grown, StepPlan
from .request import Request, RequestState
from .speculation import Speculation, StepLoad


class Drafting:
    """Moves requests between the decodes and the drafts of a plan as `speculation` chooses."""

    __slots__ = ("_decodes", "_kv", "_tiers", "speculation")

    def __init__(self, speculation: Speculation, tiers: KvTiers, decodes: Decodes, kv: KvAdmission) -> None:
        self.speculation = speculation
        self._tiers = tiers
        self._decodes = decodes
        self._kv = kv

    def plan(self, plan: StepPlan, token_budget: int) -> None:
        """Draft for those of the decoding requests for whom it pays, within what is left of the budget.
        Their tables have grown to their last known token."""
        requests, context = self._decodes.requests, self._decodes.context
        load = StepLoad(len(requests), context, plan.prefill_tokens, plan.prefill_context)
        room = token_budget - len(requests) - plan.prefill_tokens
        for guesses in self.speculation.choose(requests, load, room):
            self._draft(guesses.request, guesses.tokens, plan)

    def commit(self, plan: StepPlan, step: int) -> None:
        """The tokens that held are there: put the requests back that go on, to decode from `step` on."""
        for draft, request in zip(plan.drafts, plan.draft_requests, strict=True):
            if request.state is not RequestState.RUNNING:
                continue
            outputs = len(request.output_ids)
            request.num_planned_outputs = outputs
            self._tiers.settle_draft(request, draft.start, len(request.prompt_ids) + outputs - 1)
            if end_of(request) is None:
                self._decodes.start(request, step)
                self._kv.renew(request, step)

    def _draft(self, request: Request, guesses: list[int], plan: StepPlan) -> None:
        known = request.tokens_at(plan.step)
        held = len(request.blocks)
        blocks = self._tiers.reserve(request, known + len(guesses), self._kv.watermark)
        del guesses[max(0, len(request.blocks) * self._tiers.block_size - known) :]
        if not guesses:
            return
        plan.grown += [Grown(request.slot, held + index, block) for index, block in enumerate(blocks)]
        self._decodes.stop(request, plan.step)
        plan.drafts.append(Draft(request.slot, known - 1, [request.output_ids[-1], *guesses]))
        plan.draft_requests.append(request)
        plan.draft_context += known
