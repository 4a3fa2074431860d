"""The engine loop: every request answered exactly once, from any number of threads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.null_executor import NullExecutor, PlannedStep
from chiron_engine.core.requests import QueueFull, build_request
from chiron_engine.policy.iteration.plan import StepPlan, StepResult
from chiron_engine.policy.iteration.request import FinishReason, Request
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.serving.engine_loop import EngineLoop, EngineUnavailable, LoopOutput, LoopState

SHAPE = ExecutorShape(
    block_size=16,
    num_device_blocks=256,
    num_host_blocks=0,
    max_slots=16,
    max_step_tokens=128,
    max_model_len=512,
    vocab_size=100,
)
WAIT_S = 10.0


class Collector:
    """A subscriber that keeps tokens and ends by request, and lets a test wait for ends."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, list[FinishReason | str | None]] = {}
        self._changed = threading.Condition()

    def __call__(self, output: LoopOutput) -> None:
        with self._changed:
            for request, token in zip(output.step.requests, output.step.tokens or [], strict=True):
                assert request.request_id not in self.ends
                self.tokens.setdefault(request.request_id, []).append(token)
            for request in output.step.finished:
                self.ends.setdefault(request.request_id, []).append(request.finish_reason)
            for rejection in output.rejected:
                name = type(rejection.error).__name__
                self.ends.setdefault(rejection.request.request_id, []).append(name)
            self._changed.notify_all()

    def wait_ended(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ends) >= count, WAIT_S), len(self.ends)


class SlowExecutor(NullExecutor):
    def collect(self, handle: PlannedStep) -> StepResult:
        time.sleep(0.005)
        return super().collect(handle)


class BrokenExecutor(SlowExecutor):
    """Fails at the tenth step."""

    steps = 0

    def submit(self, plan: StepPlan) -> PlannedStep:
        self.steps += 1
        if self.steps == 10:
            raise RuntimeError("device lost")
        return super().submit(plan)


def request(request_id: int, max_tokens: int = 10, prompt: int = 3) -> Request:
    return build_request(
        request_id,
        [request_id % 50] * prompt,
        SamplingParams(max_tokens=max_tokens, seed=request_id),
        shape=SHAPE,
        eos_token_ids=(),
        draw_seed=lambda: 0,
        arrival=time.monotonic(),
    )


@contextmanager
def running(executor: NullExecutor | None = None, **core: int) -> Iterator[tuple[EngineLoop, Collector]]:
    loop = EngineLoop(EngineCore(executor if executor is not None else NullExecutor(SHAPE), **core))
    collector = Collector()
    loop.subscribe(collector)
    loop.start()
    try:
        yield loop, collector
    finally:
        loop.stop()
        loop.ended.result(WAIT_S)


def test_many_threads_submit_and_abort_and_each_request_ends_once() -> None:
    threads, each = 8, 40

    with running(SlowExecutor(SHAPE)) as (loop, collector):

        def client(number: int) -> None:
            rng = random.Random(number)
            for index in range(each):
                request_id = number * each + index
                loop.submit(request(request_id, max_tokens=rng.randint(1, 8)))
                if rng.random() < 0.3:
                    loop.abort([request_id])
                time.sleep(rng.random() * 0.003)

        with ThreadPoolExecutor(threads) as clients:
            list(clients.map(client, range(threads)))
        collector.wait_ended(threads * each)
        assert all(len(reasons) == 1 for reasons in collector.ends.values())
        assert {r for (r,) in collector.ends.values()} == {FinishReason.LENGTH, FinishReason.ABORT}
        load = loop.load
        assert (load.running, load.waiting, load.free_blocks) == (0, 0, load.total_blocks)


def test_wakes_up_for_every_submit_after_sleeping() -> None:
    """The race between falling asleep and a submit, many times over."""
    with running() as (loop, collector):
        for request_id in range(300):
            loop.submit(request(request_id, max_tokens=1))
            collector.wait_ended(request_id + 1)
        assert all(reasons == [FinishReason.LENGTH] for reasons in collector.ends.values())


def test_sleeps_while_idle() -> None:
    with running() as (loop, collector):
        loop.submit(request(1))
        collector.wait_ended(1)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1


def test_a_full_queue_rejects_and_keeps_the_rest() -> None:
    with running(SlowExecutor(SHAPE), max_queued_requests=4) as (loop, collector):
        for request_id in range(60):
            loop.submit(request(request_id, max_tokens=20))
        collector.wait_ended(60)
        ends = [reasons[0] for reasons in collector.ends.values()]
        assert QueueFull.__name__ in ends
        assert FinishReason.LENGTH in ends
        assert set(ends) == {QueueFull.__name__, FinishReason.LENGTH}


def test_drain_finishes_what_is_here_and_takes_no_more() -> None:
    with running(SlowExecutor(SHAPE)) as (loop, collector):
        for request_id in range(20):
            loop.submit(request(request_id))
        loop.drain()
        with pytest.raises(EngineUnavailable, match="draining"):
            loop.submit(request(99))
        loop.drained.result(WAIT_S)
        assert sorted(collector.ends) == list(range(20))
        assert all(reasons == [FinishReason.LENGTH] for reasons in collector.ends.values())


def test_draining_an_idle_loop_is_done_at_once() -> None:
    with running() as (loop, _):
        time.sleep(0.05)
        loop.drain()
        loop.drained.result(1.0)


def test_stop_ends_what_is_left_with_abort() -> None:
    with running(SlowExecutor(SHAPE)) as (loop, collector):
        for request_id in range(40):
            loop.submit(request(request_id, max_tokens=400))
        time.sleep(0.05)
        loop.stop()
        assert loop.ended.result(WAIT_S) is LoopState.STOPPED
        assert {r for (r,) in collector.ends.values()} <= {FinishReason.ABORT, EngineUnavailable.__name__}
        assert len(collector.ends) == 40
        with pytest.raises(EngineUnavailable, match="stopped"):
            loop.submit(request(99))


def test_stop_before_start_ends_too() -> None:
    loop = EngineLoop(EngineCore(NullExecutor(SHAPE)))
    loop.stop()
    assert loop.ended.result(0) is LoopState.STOPPED


def test_a_failed_step_ends_every_request_with_error() -> None:
    with running(BrokenExecutor(SHAPE)) as (loop, collector):
        for request_id in range(30):
            loop.submit(request(request_id, max_tokens=100))
        assert loop.ended.result(WAIT_S) is LoopState.FAILED
        assert {reasons[0] for reasons in collector.ends.values()} == {FinishReason.ERROR}
        assert len(collector.ends) == 30
        with pytest.raises(EngineUnavailable, match="failed"):
            loop.submit(request(99))
        with pytest.raises(EngineUnavailable):
            loop.set_limits(1, 1).result(1.0)


def test_limits_apply_and_bad_ones_are_refused() -> None:
    with running(SlowExecutor(SHAPE)) as (loop, collector):
        loop.set_limits(2, 64).result(WAIT_S)
        for request_id in range(8):
            loop.submit(request(request_id))
        most = 0
        while len(collector.ends) < 8:
            most = max(most, loop.load.running)
            time.sleep(0.001)
        assert most == 2
        with pytest.raises(ValueError, match="max_running"):
            loop.set_limits(0, 64).result(WAIT_S)


def test_a_change_of_limits_given_up_harms_nobody() -> None:
    with running(SlowExecutor(SHAPE)) as (loop, collector):
        loop.submit(request(0))
        assert any(loop.set_limits(1, 64).cancel() for _ in range(100))
        collector.wait_ended(1)
        assert loop.set_limits(2, 64).result(WAIT_S) is None
        assert loop.state is LoopState.RUNNING


def test_a_failing_subscriber_is_dropped_and_harms_nobody() -> None:
    def broken(output: LoopOutput) -> None:
        raise RuntimeError("no")

    with running() as (loop, collector):
        loop.subscribe(broken)
        loop.submit(request(1))
        loop.submit(request(2))
        collector.wait_ended(2)
        assert loop.state is LoopState.RUNNING
