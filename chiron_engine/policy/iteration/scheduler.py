"""What one engine does in each step: who decodes, whose prompt advances, who joins, who gives way.

There are no prefill or decode phases: a running request either computes its next chunk of known
tokens or decodes one token. A step costs O(changes): decoding requests that stay are not touched.
Their position follows from the step number, the block each will need falls into one of
`block_size` buckets, and the step that yields its last token stands in a heap (`decodes`).

Interactive requests come before batch ones: in the queue, in the prompt budget of a step, and for
blocks and places, which batch requests give up to them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator

from .blocks import OutOfBlocks
from .decodes import Decodes
from .drafting import Drafting
from .kv_admission import KvAdmission
from .kv_tiers import KvTiers, Placement
from .limits import Limits
from .output_lengths import OutputLengths
from .plan import Grown, Joined, StepOutput, StepPlan, StepResult
from .prefills import Prefills
from .request import FinishReason, Request, RequestState, SloClass
from .speculation import Speculation
from .step_outcome import ENDED, outcome
from .waiting_queue import WaitingQueue, priority

MAX_EVICTIONS = 3
"""How often, over all engines, a batch request gives way to an interactive one that wants its place, so
that it gets on; lower limits, and blocks that run short, take it all the same."""
UNBOUNDED = 1 << 60


class Scheduler:
    """Pure policy: every call is given what it needs to know, time included.

    `plan` may run ahead of `commit` by the executor's pipeline depth (at most two steps under
    way): counters advance when a step is planned, token values arrive when it is committed.

    hand_back_evicted: batch requests that lose their place leave the engine, listed in
    `handed_back` until somebody takes them from there, instead of waiting here for another.
    num_requests: of each class, waiting or running. num_running_batch: of the batch class, running.
    speculation: guesses tokens; `plan` then must not run ahead of `commit`.
    """

    def __init__(
        self, tiers: KvTiers, limits: Limits, max_slots: int, speculation: Speculation | None = None
    ) -> None:
        self.tiers = tiers
        self.limits = limits
        self.max_slots = max_slots
        self.waiting = WaitingQueue()
        self.running: dict[Request, None] = {}
        self.output_lengths = OutputLengths()
        self.step = 0
        self.hand_back_evicted = False
        self.handed_back: list[Request] = []
        self.num_requests = [0] * len(SloClass)
        self.num_preemptions = 0
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0
        self._decodes = Decodes(tiers.block_size)
        self._prefills = Prefills(tiers)
        self._kv = KvAdmission(tiers, self.output_lengths)
        self.speculation = speculation
        self._drafting = Drafting(speculation, tiers, self._decodes, self._kv) if speculation else None
        self._first_tokens: list[tuple[float, int, Request]] = []
        self._num_added = 0
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._left: list[int] = []
        self.num_running_batch = 0
        self._head_is_blocked = False

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def queued_tokens(self) -> int:
        """Known tokens that waiting and running requests have yet to compute, found blocks not
        taken off for those that wait."""
        return self.waiting.num_tokens + sum(self._prefills.tokens_left)

    @property
    def queued_interactive_tokens(self) -> int:
        """Those of them that interactive requests have."""
        return self.waiting.num_interactive_tokens + self._prefills.tokens_left[SloClass.INTERACTIVE]

    def first_token_due(self) -> float:
        """When the most urgent interactive request without a first token is to have one; infinite
        without such a request."""
        heap = self._first_tokens
        while heap:
            due, _, request = heap[0]
            if request.first_token is None and request.state in (RequestState.WAITING, RequestState.RUNNING):
                return due
            heapq.heappop(heap)
        return math.inf

    def add(self, request: Request) -> None:
        """Queue a request, a new one or one that was handed back. Raises ValueError when even an
        empty pool could not hold it, or when it has left its engine or ended."""
        if request.state not in (RequestState.WAITING, RequestState.EVICTED):
            raise ValueError(f"request {request.request_id} is {request.state.value}; it cannot be added")
        most = self.tiers.blocks_for(len(request.prompt_ids) + request.max_tokens)
        if most > self.tiers.device.num_blocks:
            raise ValueError(
                f"prompt of {len(request.prompt_ids)} and max_tokens of {request.max_tokens} need {most} "
                f"KV blocks; the engine has {self.tiers.device.num_blocks}"
            )
        # Hashed here, once, so that no step pays for it.
        self.tiers.extend_keys(request, len(request.prompt_ids))
        request.state = RequestState.WAITING
        self.waiting.push(request)
        slo = request.slo
        self.num_requests[slo.slo_class] += 1
        if slo.slo_class is SloClass.INTERACTIVE:
            self._num_added += 1
            heapq.heappush(self._first_tokens, (request.arrival + slo.ttft_s, self._num_added, request))
        self._head_is_blocked = False

    def abort(self, request: Request) -> bool:
        """Drop a request wherever it stands; False if it had ended or left."""
        if request.state in ENDED:
            return False
        self._finish(request, FinishReason.ABORT)
        return True

    def forget(self, request: Request) -> None:
        """Drop what was saved of a request that was handed back. Raises ValueError for any other."""
        if request.state is not RequestState.EVICTED:
            raise ValueError(f"request {request.request_id} is {request.state.value}, not handed back")
        request.state = RequestState.LEFT
        self.tiers.leave(request)

    def give_back(self, slo_class: SloClass) -> list[Request]:
        """Take every request of a class out, in order of service, and keep nothing of theirs. Tokens
        of steps under way are lost to them."""
        leaving = [r for r in (*self.running, *self.waiting) if r.slo.slo_class is slo_class]
        for request in leaving:
            self._take_out(request, RequestState.LEFT)
        return sorted(leaving, key=priority)

    def set_limits(self, limits: Limits) -> None:
        """Limits for the next plan. Raises ValueError above the fixed capacity."""
        if limits.max_running > self.max_slots:
            raise ValueError(f"max_running is {limits.max_running}; the engine has {self.max_slots} slots")
        self.limits = limits
        self._head_is_blocked = False

    # Planning.

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when there is nothing to do.

        Running requests come first: their tables grow, if need be at the cost of others. Waiting ones
        join as far as places, token budget and KV allow. Then what the decodes leave of the budget
        goes to prompts, those that have just joined included, and then to guesses.
        """
        plan = StepPlan(self.step, left=self._left)
        decodes, prefills = self._decodes, self._prefills
        if self.limits.shrink == "preempt":
            self._shrink(plan)
        due = decodes.growing(self.step)
        if due:
            self._grow(due, plan)
        if self.waiting and not self._head_is_blocked:
            self._admit(plan, now)
        if any(prefills.tokens_left):
            prefills.advance(self.limits.token_budget - len(decodes.requests), plan)
        if self._drafting is not None and decodes.requests:
            self._drafting.plan(plan, self.limits.token_budget)
        if decodes.requests:
            plan.decode = decodes.batch()
            plan.decode_context = decodes.context
        if plan.is_empty:
            return None
        self._advance(plan)
        return plan

    def _advance(self, plan: StepPlan) -> None:
        """Count as if the step had run: who decoded its last token by length, and who decodes from
        the next step on."""
        decodes = self._decodes
        decodes.context += len(decodes.requests)
        self.tiers.settle()
        self._left = []
        self.step += 1
        plan.final = decodes.stop_at_length(plan.step)
        if not plan.chunks:
            return
        for request in self._prefills.take_complete(plan):
            request.num_planned_outputs += 1
            if request.num_planned_outputs == request.max_tokens:
                plan.final.append(request)
            else:
                decodes.start(request, self.step)

    def _shrink(self, plan: StepPlan) -> None:
        while len(self.running) > self.limits.max_running:
            victim = self._victim(lambda r: r.slo.slo_class is SloClass.BATCH)
            if victim is None:
                return
            self._preempt(victim, plan)

    def _grow(self, due: dict[Request, None], plan: StepPlan) -> None:
        """Give a block to each decoding request whose last one is full, oldest first, evicting the
        request served last (perhaps the one that asks) where none is free."""
        ordered = sorted(due, key=priority) if self.tiers.device.num_free < len(due) else list(due)
        for request in ordered:
            if request in self._decodes:
                self._grow_one(request, plan)

    def _grow_one(self, request: Request, plan: StepPlan) -> None:
        position = request.tokens_at(self.step) - 1
        while True:
            try:
                block = self.tiers.grow(request, position)
            except OutOfBlocks:
                victim = self._victim(lambda r: True)
                if victim is None:
                    raise
                self._preempt(victim, plan)
                if victim is request:
                    return
                continue
            plan.grown.append(Grown(request.slot, len(request.blocks) - 1, block))
            return

    def _admit(self, plan: StepPlan, now: float) -> None:
        """Move waiting requests to slots, in order, while prompt budget is left for them, evicting batch
        ones for interactive ones. A head that does not fit blocks those behind it until something
        changes, so nothing starves."""
        while (head := self.waiting.head) is not None and self._prompt_budget(head.slo.slo_class) > 0:
            # A request evicted by this plan may have a token under way: it returns in a later one.
            if head in plan.preempted:
                return
            known = head.tokens_at(self.step)
            placement = self.tiers.place(head, known)
            while not self._fits(head, known, placement):
                victim = self._victim_for(head)
                if victim is None:
                    self._head_is_blocked = True
                    return
                self._preempt(victim, plan)
                placement = self.tiers.place(head, known)
            self._join(self.waiting.pop(), placement, known, plan, now)

    def _prompt_budget(self, slo_class: SloClass) -> int:
        """Tokens of this step that the prompts under way leave to a newcomer of this class."""
        ahead = self._prefills.ahead_of(slo_class)
        return self.limits.token_budget - len(self._decodes.requests) - ahead

    def _fits(self, request: Request, known: int, placement: Placement) -> bool:
        """A slot is free, and the KV cache has room."""
        if len(self.running) >= self.limits.max_running or not self._free_slots:
            return False
        return self._kv.fits(request, known, placement, self.running, self.step)

    def _join(self, request: Request, placement: Placement, known: int, plan: StepPlan, now: float) -> None:
        self.num_running_batch += request.slo.slo_class is SloClass.BATCH
        plan.copies_in += self.tiers.enter(request, placement)
        computed = (len(placement.device) + len(placement.host)) * self.tiers.block_size
        if request.first_scheduled is None:
            request.first_scheduled = now
            request.num_cached_tokens = computed
            self.prefix_query_tokens += known
            self.prefix_hit_tokens += computed
        request.num_computed = computed
        request.slot = self._free_slots.pop()
        request.state = RequestState.RUNNING
        self.running[request] = None
        self._kv.join(request, self.step)
        self._prefills.start(request, known)
        tokens = [*request.prompt_ids, *request.output_ids] if request.output_ids else request.prompt_ids
        plan.joined.append(Joined(request.slot, request, tokens, computed, list(request.blocks)))

    # Steps in which nobody comes or goes, without plans.

    def num_quiet_steps(self) -> int:
        """How many of the coming steps would only decode: nothing to admit, shrink or compute of a
        prompt, and nobody at max_tokens. Blocks may run short all the same."""
        running = len(self.running)
        if not running or running != len(self._decodes.requests):
            return 0
        if self.waiting and not self._head_is_blocked:
            return 0
        if self.limits.shrink == "preempt" and running > self.limits.max_running:
            return 0
        last = self._decodes.next_last_step
        assert last is not None  # every one that decodes has one
        return max(0, last - self.step)

    @property
    def decode_load(self) -> tuple[int, int]:
        """(requests, KV tokens) that the next step decodes."""
        return len(self._decodes.requests), self._decodes.context

    def pass_quiet_step(self) -> bool:
        """What `plan` and `commit` of a step that only decodes would do. False, and nothing done,
        where there are not blocks enough."""
        due = self._decodes.growing(self.step)
        if due:
            if self.tiers.device.num_free < len(due):
                return False
            for request in due:
                self.tiers.grow(request, request.tokens_at(self.step) - 1)
        self._decodes.context += len(self._decodes.requests)
        self.step += 1
        return True

    # Leaving a slot: preempted, finished, aborted or taken out.

    def _victim(self, allowed: Callable[[Request], bool]) -> Request | None:
        """The running request served last among those allowed. One whose last token is under way
        is about to leave anyway."""
        return max(filter(allowed, self._active()), key=priority, default=None)

    def _active(self) -> Iterator[Request]:
        yield from self._decodes.requests
        yield from self._prefills

    def _victim_for(self, head: Request) -> Request | None:
        """A batch request to evict for an interactive one; the same one only so many times, but where no
        interactive request would run at all."""
        if head.slo.slo_class is not SloClass.INTERACTIVE or not self.num_running_batch:
            return None
        some_run = len(self.running) > self.num_running_batch
        most = MAX_EVICTIONS if some_run else UNBOUNDED
        return self._victim(lambda r: r.slo.slo_class is SloClass.BATCH and r.num_preempted < most)

    def _preempt(self, request: Request, plan: StepPlan) -> None:
        """Take a request off the device, its KV saved or left to recompute, and queue it again or
        hand it back."""
        is_decoding = request in self._decodes
        computed = request.tokens_at(self.step) - 1 if is_decoding else request.num_computed
        plan.grown = [grown for grown in plan.grown if grown.slot != request.slot]
        self._give_back_slot(request)
        plan.copies_out += self.tiers.evict(request, computed)
        plan.preempted.append(request)
        request.num_preempted += 1
        self.num_preemptions += 1
        if self.hand_back_evicted and request.slo.slo_class is SloClass.BATCH:
            request.state = RequestState.EVICTED
            self.num_requests[SloClass.BATCH] -= 1
            self.handed_back.append(request)
            return
        request.state = RequestState.WAITING
        self.waiting.push(request)

    def _finish(self, request: Request, reason: FinishReason, produced: int = 0) -> None:
        """`produced`: its output tokens, where it came to its end by itself."""
        if produced:
            self.output_lengths.observe(produced)
            self._keep_tail(request, produced)
        self._take_out(request, RequestState.FINISHED)
        request.finish_reason = reason

    def _take_out(self, request: Request, state: RequestState) -> None:
        """The request leaves for good, wherever it stands."""
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        elif request.state is RequestState.RUNNING:
            self._give_back_slot(request)
        if request.state is not RequestState.EVICTED:
            self.num_requests[request.slo.slo_class] -= 1
        self.tiers.leave(request)
        request.state = state
        self._head_is_blocked = False

    def _keep_tail(self, request: Request, produced: int) -> None:
        """Seal the last full block, so that a follow-up prompt finds the whole conversation."""
        computed = len(request.prompt_ids) + produced - 1
        if request.blocks:
            self.tiers.seal(request, max(0, computed - self.tiers.block_size), computed)

    def _give_back_slot(self, request: Request) -> None:
        if request in self._decodes:
            self._decodes.stop(request, self.step)
        elif request in self._prefills:
            self._prefills.stop(request, self.step)
        del self.running[request]
        self._kv.leave(request)
        self.num_running_batch -= request.slo.slo_class is SloClass.BATCH
        if self.speculation is not None:
            self.speculation.forget(request)
        self._left.append(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1
        self._head_is_blocked = False

    # Committing.

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> StepOutput:
        """Take in the tokens of the oldest step under way, and end the requests they complete."""
        output, ended = outcome(plan, result, now)
        if self._drafting is not None and plan.drafts:
            self._drafting.commit(plan, self.step)
        for request, reason, produced in ended:
            self._finish(request, reason, produced)
            # Steps planned further ahead bring it nothing.
            request.num_planned_outputs = produced
        return output
