"""Blocks and scheduler under arbitrary interleavings of arrivals, aborts, resizes and steps."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.policy.iteration.autoscaler_inputs import EngineCapacity
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.plan import StepPlan
from chiron_engine.policy.iteration.request import FinishReason, Request, RequestState, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.policy.iteration.speculation import Speculation
from tests.core.checked_executor import CheckedExecutor, reference_output

VOCAB = 40
BLOCK = 4
SLOTS = 6
BUDGET = 24
SAVE = SwapCosts(0.0, 0.0, 1.0)
RECOMPUTE = SwapCosts(1.0, 1.0, 0.0)


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(8, 40),
        host_blocks=st.sampled_from([0, 3, 50]),
        depth=st.sampled_from([1, 2]),
        caching=st.booleans(),
        costs=st.sampled_from([SAVE, RECOMPUTE]),
        optimistic=st.booleans(),
        hand_back=st.booleans(),
        guesses=st.sampled_from([0, 0, 1, 7]),
    )
    def start(
        self,
        blocks: int,
        host_blocks: int,
        depth: int,
        caching: bool,
        costs: SwapCosts,
        optimistic: bool,
        hand_back: bool,
        guesses: int,
    ) -> None:
        shape = ExecutorShape(BLOCK, blocks, host_blocks, SLOTS, BUDGET, blocks * BLOCK, VOCAB, depth)
        capacity = EngineCapacity(SLOTS, BUDGET, BLOCK, blocks * BLOCK)
        self.clock = VirtualClock()
        self.executor = CheckedExecutor(shape)
        self.core = EngineCore(
            self.executor,
            clock=self.clock,
            limits=Limits(SLOTS, BUDGET),
            enable_prefix_caching=caching,
            swap_costs=costs,
            hand_back_evicted=hand_back,
            speculation=Speculation(guesses, capacity) if guesses and depth == 1 else None,
        )
        if optimistic:  # outputs are predicted to be short, so too much is admitted and blocks run out
            for _ in range(20):
                self.core.scheduler.output_lengths.observe(1)
        self.requests: dict[int, Request] = {}
        self.finished: dict[int, Request] = {}
        self.streamed: dict[int, list[int]] = {}
        self.away: dict[int, Request] = {}
        self.gone: dict[int, Request] = {}
        self.running_before = 0
        self.plans: list[StepPlan] = []
        submit = self.executor.submit
        self.executor.submit = lambda plan: (self.plans.append(plan), submit(plan))[1]  # type: ignore[method-assign]

    @rule(lengths=st.lists(st.integers(4, 30), min_size=2, max_size=5), batch=st.booleans())
    def add_several(self, lengths: list[int], batch: bool) -> None:
        for length in lengths:
            self.add(length % 4, 0, length, length, batch, frozenset())

    @rule(
        prefix=st.integers(0, 3),
        shared=st.integers(0, 20),
        own=st.integers(0, 12),
        max_tokens=st.integers(1, 30),
        batch=st.booleans(),
        stops=st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
    )
    def add_one(
        self, prefix: int, shared: int, own: int, max_tokens: int, batch: bool, stops: frozenset[int]
    ) -> None:
        self.add(prefix, shared, own, max_tokens, batch, stops)

    def add(
        self, prefix: int, shared: int, own: int, max_tokens: int, batch: bool, stops: frozenset[int]
    ) -> None:
        number = len(self.requests)
        prompt = [(prefix * 5 + i * 3) % VOCAB for i in range(shared)]
        prompt += [(number * 7 + i) % VOCAB for i in range(own)]
        prompt = (prompt or [prefix])[: self.core.shape.max_model_len - 1]
        request = Request(
            request_id=number,
            prompt_ids=prompt,
            sampling=SamplingParams(temperature=0.0, prompt_logprobs=None if len(prompt) % 3 else 1),
            max_tokens=min(max_tokens, self.core.shape.max_model_len - len(prompt)),
            stop_ids=stops,
            slo=Slo(SloClass.BATCH if batch else SloClass.INTERACTIVE),
            arrival=self.clock.now(),
        )
        self.core.add(request)
        self.requests[number] = request

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        self.clock.sleep(0.01)
        self.plans.clear()
        running_before = set(self.core.scheduler.running)
        output = self.core.step()
        for plan in self.plans:
            self.check_plan(plan)
        limit = max(self.core.scheduler.limits.max_running, len(running_before))
        assert len(self.core.scheduler.running) <= limit
        for request, token in zip(output.requests, output.tokens or [], strict=True):
            self.streamed.setdefault(request.request_id, []).append(token)
        for request in output.finished:
            assert request.request_id not in self.finished, "finished twice"
            self.finished[request.request_id] = request
        for request in output.handed_back:
            assert self.core.hand_back_evicted and request.slo.slo_class is SloClass.BATCH
            assert request.state is RequestState.EVICTED and request.request_id not in self.away
            self.away[request.request_id] = request

    def check_plan(self, plan: StepPlan) -> None:
        decodes = len(plan.decode.slots)
        assert plan.prefill_tokens == sum(c.count for c in plan.chunks)
        decodes += len(plan.drafts)
        tokens = decodes + plan.prefill_tokens + plan.drafted_tokens
        assert tokens <= max(self.core.scheduler.limits.token_budget, decodes)
        assert not set(plan.draft_requests) & set(plan.decode.requests)
        assert not set(plan.preempted) & {j.request for j in plan.joined}

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = [n for n in self.requests if n not in self.finished]
        if live:
            number = data.draw(st.sampled_from(live))
            is_here = self.requests[number].state in (RequestState.WAITING, RequestState.RUNNING)
            assert self.core.abort(number) or not is_here

    @rule(data=st.data(), forget=st.booleans())
    def call_back(self, data: st.DataObject, forget: bool) -> None:
        """A request that was handed back runs here again, or somewhere else."""
        if not self.away:
            return
        request = self.away.pop(data.draw(st.sampled_from(sorted(self.away))))
        if not forget:
            self.core.add(request)
            return
        self.core.forget(request)
        self.gone[request.request_id] = request
        with pytest.raises(ValueError, match="it cannot be added"):
            self.core.add(request)

    @rule(seldom=st.integers(0, 4))
    def drain_batch(self, seldom: int) -> None:
        if seldom:
            return
        for request in self.core.give_back_batch():
            assert request.slo.slo_class is SloClass.BATCH and not (request.blocks or request.host_blocks)
            self.gone[request.request_id] = request
        assert self.core.scheduler.num_requests[SloClass.BATCH] == 0

    @rule(
        running=st.integers(1, SLOTS), more=st.integers(0, 12), shrink=st.sampled_from(["drain", "preempt"])
    )
    def resize(self, running: int, more: int, shrink: Any) -> None:
        self.core.set_limits(running, min(running + more, BUDGET), shrink)

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        if not hasattr(self, "core"):
            return
        tiers = self.core.scheduler.tiers
        everyone = list(self.requests.values())
        tiers.device.check([r.blocks for r in everyone])
        tiers.host.check([r.host_blocks for r in everyone])
        running = list(self.core.scheduler.running)
        assert len({r.slot for r in running}) == len(running)
        assert all(0 <= r.slot < SLOTS for r in running)
        assert all(not r.host_blocks for r in running)
        assert all(not r.blocks for r in everyone if r not in self.core.scheduler.running)

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        self.core.set_limits(SLOTS, BUDGET)
        bound = 50 + 4 * sum(len(r.prompt_ids) + r.max_tokens for r in self.requests.values())
        for _ in range(bound):
            if not (self.core.has_work or self.away):
                break
            while self.away:
                self.core.add(self.away.popitem()[1])
            self.step()
        assert not self.core.has_work, "a request starves"
        load = self.core.load()
        assert (load.free_blocks, load.free_host_blocks) == (load.total_blocks, load.total_host_blocks)
        scheduler = self.core.scheduler
        assert (scheduler.num_running_batch, scheduler.queued_tokens) == (0, 0)
        assert scheduler.num_requests == [0, 0]
        assert scheduler._decodes.is_idle() and scheduler._prefills.is_idle() and scheduler._kv.is_idle()
        assert scheduler.speculation is None or scheduler.speculation.is_idle()
        assert len(scheduler._free_slots) == SLOTS
        assert sorted([*self.finished, *self.gone]) == sorted(self.requests)
        for number, request in self.finished.items():
            self.check_output(number, request)
        for number, request in self.gone.items():
            self.check_streamed(number, request)
        self.blocks_are_accounted_for()

    def check_streamed(self, number: int, request: Request) -> list[int]:
        """What it yielded is what it has, and a beginning of the right output, which is returned."""
        expected = reference_output(list(request.prompt_ids), request.max_tokens, request.stop_ids, VOCAB)
        output = self.streamed.get(number, [])
        assert output == list(request.output_ids) == expected[: len(output)]
        return expected

    def check_output(self, number: int, request: Request) -> None:
        expected = self.check_streamed(number, request)
        if request.finish_reason is FinishReason.ABORT:
            return
        output = list(request.output_ids)
        assert output == expected
        stopped = output[-1] in request.stop_ids
        assert request.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


TestEngineMachine = pytest.mark.filterwarnings("ignore")(EngineMachine.TestCase)
TestEngineMachine.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
