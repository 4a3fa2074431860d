"""What one engine does in each step: who decodes, whose prompt advances, who joins, who gives way.

There are no prefill or decode phases: a running request either computes its next chunk of known
tokens or decodes one token. A step costs O(changes): decoding requests that stay are not touched.
Their position follows from the step number, the block each will need falls into one of
`block_size` buckets, and the step that yields its last token stands in a heap.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from .blocks import OutOfBlocks
from .kv_tiers import KvTiers, Placement
from .limits import Limits
from .output_lengths import OutputLengths, peak_tokens
from .plan import NO_DECODES, Chunk, DecodeBatch, Grown, Joined, StepOutput, StepPlan, StepResult
from .request import FinishReason, Request, RequestState, SloClass
from .waiting_queue import WaitingQueue, priority

WATERMARK = 0.01
MAX_EVICTIONS = 3


class Scheduler:
    """Pure policy: every call is given what it needs to know, time included.

    `plan` may run ahead of `commit` by the executor's pipeline depth (at most two steps under
    way): counters advance when a step is planned, token values arrive when it is committed.
    """

    def __init__(self, tiers: KvTiers, limits: Limits, max_slots: int) -> None:
        self.tiers = tiers
        self.limits = limits
        self.max_slots = max_slots
        self.waiting = WaitingQueue()
        self.running: dict[Request, None] = {}
        self.output_lengths = OutputLengths()
        self.step = 0
        self.num_preemptions = 0
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0
        self._watermark = int(tiers.device.num_blocks * WATERMARK)
        self._decoding: dict[Request, None] = {}
        self._prefilling: dict[Request, None] = {}
        self._decode_batch: DecodeBatch | None = NO_DECODES
        self._decode_context = 0
        self._growing: list[dict[Request, None]] = [{} for _ in range(tiers.block_size)]
        self._last_steps: list[tuple[int, int, Request]] = []
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._left: list[int] = []
        self._promised_blocks = 0
        self._num_running_batch = 0
        self._head_is_blocked = False

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError when even an empty pool could not hold it."""
        most = self.tiers.blocks_for(len(request.prompt_ids) + request.max_tokens)
        if most > self.tiers.device.num_blocks:
            raise ValueError(
                f"prompt of {len(request.prompt_ids)} and max_tokens of {request.max_tokens} need {most} "
                f"KV blocks; the engine has {self.tiers.device.num_blocks}"
            )
        # Hashed here, once, so that no step pays for it.
        self.tiers.extend_keys(request, len(request.prompt_ids))
        self.waiting.push(request)
        self._head_is_blocked = False

    def abort(self, request: Request) -> bool:
        """Drop a request wherever it stands; False if it had finished."""
        if request.state is RequestState.FINISHED:
            return False
        self._finish(request, FinishReason.ABORT)
        return True

    def set_limits(self, limits: Limits) -> None:
        """Limits for the next plan. Raises ValueError above the fixed capacity."""
        if limits.max_running > self.max_slots:
            raise ValueError(f"max_running is {limits.max_running}; the engine has {self.max_slots} slots")
        self.limits = limits
        self._head_is_blocked = False

    # Planning, in order: shrink, grow what decodes, admit, advance prompts, fix the decode batch.

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when there is nothing to do."""
        plan = StepPlan(self.step, left=self._left)
        self._shrink(plan)
        self._grow(plan)
        self._admit(plan, now)
        self._advance_prompts(plan)
        if self._decoding:
            plan.decode = self._current_batch()
            plan.decode_context = self._decode_context
            self._decode_context += len(self._decoding)
        if plan.is_empty:
            return None
        self.tiers.settle()
        self._left = []
        self.step += 1
        self._retire_last_steps(plan)
        self._start_decoding(plan)
        return plan

    def _shrink(self, plan: StepPlan) -> None:
        if self.limits.shrink != "preempt":
            return
        while len(self.running) > self.limits.max_running:
            victim = self._victim(lambda r: r.slo.slo_class is SloClass.BATCH)
            if victim is None:
                return
            self._preempt(victim, plan)

    def _grow(self, plan: StepPlan) -> None:
        """Give a block to each decoding request whose last one is full, oldest first, evicting the
        request served last (perhaps the one that asks) where none is free."""
        due = self._growing[self.step % self.tiers.block_size]
        if not due:
            return
        ordered = sorted(due, key=priority) if self.tiers.device.num_free < len(due) else list(due)
        for request in ordered:
            if request in self._decoding:
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
        """Move waiting requests to slots, in order, while prompt budget is left for them. A head
        that does not fit blocks those behind it until something changes, so nothing starves."""
        if self._head_is_blocked or not self.waiting:
            return
        budget = self.limits.token_budget - len(self._decoding)
        budget -= sum(r.tokens_at(self.step) - r.num_computed for r in self._prefilling)
        while budget > 0 and (head := self.waiting.head) is not None:
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
            budget -= known - head.num_computed

    def _fits(self, request: Request, known: int, placement: Placement) -> bool:
        """A slot is free, the blocks are there with some to spare, and so is the predicted peak."""
        if len(self.running) >= self.limits.max_running or not self._free_slots:
            return False
        request.promised_blocks = self.tiers.blocks_for(known + self._tokens_to_come(request))
        spare = self.tiers.device.num_free - placement.free_needed
        if not self.running:
            return spare >= 0
        if spare < self._watermark:
            return False
        capacity = self.tiers.device.num_blocks
        if self._promised_blocks + request.promised_blocks <= capacity:
            return True
        return self._predicted_peak(request) <= capacity * self.tiers.block_size

    def _tokens_to_come(self, request: Request) -> int:
        produced = request.outputs_at(self.step)
        return self.output_lengths.remaining(produced, request.max_tokens - produced)

    def _predicted_peak(self, newcomer: Request) -> int:
        together = [*self.running, newcomer]
        return peak_tokens(
            ((r.tokens_at(self.step), self._tokens_to_come(r)) for r in together), self.tiers.block_size
        )

    def _join(self, request: Request, placement: Placement, known: int, plan: StepPlan, now: float) -> None:
        self._promised_blocks += request.promised_blocks
        self._num_running_batch += request.slo.slo_class is SloClass.BATCH
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
        self._prefilling[request] = None
        tokens = [*request.prompt_ids, *request.output_ids] if request.output_ids else request.prompt_ids
        plan.joined.append(Joined(request.slot, request, tokens, computed, list(request.blocks)))

    def _advance_prompts(self, plan: StepPlan) -> None:
        """Spend what the decodes leave of the budget on known tokens, in order of joining."""
        budget = self.limits.token_budget - len(self._decoding)
        for request in self._prefilling:
            if budget <= 0:
                return
            known = request.tokens_at(self.step)
            start = request.num_computed
            count = min(known - start, budget)
            end = start + count
            budget -= count
            request.num_computed = end
            self.tiers.seal(request, start, end)
            plan.chunks.append(Chunk(request.slot, start, count, samples=end == known))
            plan.chunk_requests.append(request)
            plan.prefill_tokens += count
            plan.prefill_context += count * end

    def _start_decoding(self, plan: StepPlan) -> None:
        """Requests whose chunk samples in this plan decode from the next step on."""
        for chunk, request in zip(plan.chunks, plan.chunk_requests, strict=True):
            if not chunk.samples:
                continue
            del self._prefilling[request]
            request.num_planned_outputs += 1
            if request.num_planned_outputs == request.max_tokens:
                plan.final.append(request)
                continue
            request.decode_since = self.step
            tokens = request.tokens_at(self.step)
            self._decoding[request] = None
            self._decode_batch = None
            self._decode_context += tokens
            self._growing[self._growth_bucket(request)][request] = None
            last = self.step + request.max_tokens - request.num_planned_outputs - 1
            heapq.heappush(self._last_steps, (last, request.request_id, request))

    def _retire_last_steps(self, plan: StepPlan) -> None:
        """Requests that reach max_tokens in this plan decode no more; commit ends them."""
        while self._last_steps and self._last_steps[0][0] <= plan.step:
            _, _, request = heapq.heappop(self._last_steps)
            if request in self._decoding and request.outputs_at(self.step) == request.max_tokens:
                self._stop_decoding(request)
                plan.final.append(request)

    def _current_batch(self) -> DecodeBatch:
        if self._decode_batch is None:
            requests = tuple(self._decoding)
            self._decode_batch = DecodeBatch(requests, tuple([r.slot for r in requests]))
        return self._decode_batch

    def _growth_bucket(self, request: Request) -> int:
        """Steps congruent to this need a block: there the position to compute opens a new one."""
        return (request.decode_since - request.tokens_at(request.decode_since) + 1) % self.tiers.block_size

    # Leaving a slot: preempted, finished or aborted.

    def _victim(self, allowed: Callable[[Request], bool]) -> Request | None:
        """The running request served last among those allowed. One whose last token is under way
        is about to leave anyway."""
        candidates = [r for r in (*self._decoding, *self._prefilling) if allowed(r)]
        return max(candidates, key=priority, default=None)

    def _victim_for(self, head: Request) -> Request | None:
        """A batch request to evict for an interactive one; the same one only so many times."""
        if head.slo.slo_class is not SloClass.INTERACTIVE or not self._num_running_batch:
            return None
        return self._victim(lambda r: r.slo.slo_class is SloClass.BATCH and r.num_preempted < MAX_EVICTIONS)

    def _preempt(self, request: Request, plan: StepPlan) -> None:
        """Take a request off the device, its KV saved or left to recompute, and queue it again."""
        is_decoding = request in self._decoding
        computed = request.tokens_at(self.step) - 1 if is_decoding else request.num_computed
        plan.grown = [grown for grown in plan.grown if grown.slot != request.slot]
        self._give_back_slot(request)
        plan.copies_out += self.tiers.evict(request, computed)
        plan.preempted.append(request)
        request.state = RequestState.WAITING
        request.num_preempted += 1
        self.num_preemptions += 1
        self.waiting.push(request)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        else:
            self._give_back_slot(request)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            produced = len(request.output_ids) or request.num_planned_outputs
            self.output_lengths.observe(produced)
            self._keep_tail(request, produced)
        self.tiers.leave(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        self._head_is_blocked = False

    def _keep_tail(self, request: Request, produced: int) -> None:
        """Seal the last full block, so that a follow-up prompt finds the whole conversation."""
        computed = len(request.prompt_ids) + produced - 1
        if request.blocks:
            self.tiers.seal(request, max(0, computed - self.tiers.block_size), computed)

    def _give_back_slot(self, request: Request) -> None:
        if request in self._decoding:
            self._stop_decoding(request)
        self._prefilling.pop(request, None)
        del self.running[request]
        self._promised_blocks -= request.promised_blocks
        self._num_running_batch -= request.slo.slo_class is SloClass.BATCH
        self._left.append(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1
        self._head_is_blocked = False

    def _stop_decoding(self, request: Request) -> None:
        self._decode_context -= request.tokens_at(self.step)
        del self._decoding[request]
        del self._growing[self._growth_bucket(request)][request]
        self._decode_batch = None
        request.num_planned_outputs = request.outputs_at(self.step)
        request.decode_since = -1

    # Committing.

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> StepOutput:
        """Take in the tokens of the oldest step under way, and end the requests they complete."""
        sampled = [r for c, r in zip(plan.chunks, plan.chunk_requests, strict=True) if c.samples]
        for request in sampled:
            if request.first_token is None:
                request.first_token = now
        output = StepOutput(plan.step, (*plan.decode.requests, *sampled), result.tokens)
        stopped = self._append(output) if result.tokens is not None else []
        for request in stopped:
            self._finish(request, FinishReason.STOP)
        ended = [r for r in plan.final if r.finish_reason is None]
        for request in ended:
            self._finish(request, FinishReason.LENGTH)
        output.finished = stopped + ended
        return output

    def _append(self, output: StepOutput) -> list[Request]:
        """Append each request's token; returns those that it stops. A request that ended after
        this step was planned takes no more tokens."""
        stopped = []
        stale = False
        assert output.tokens is not None
        for request, token in zip(output.requests, output.tokens, strict=True):
            if request.finish_reason is not None:
                stale = True
                continue
            request.output_ids.append(token)
            if token in request.stop_ids:
                stopped.append(request)
        if stale:
            self._drop_stale(output)
        return stopped

    @staticmethod
    def _drop_stale(output: StepOutput) -> None:
        assert output.tokens is not None
        live = [
            (r, t) for r, t in zip(output.requests, output.tokens, strict=True) if r.finish_reason is None
        ]
        output.requests = tuple(r for r, _ in live)
        output.tokens = [t for _, t in live]
