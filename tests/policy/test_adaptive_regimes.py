"""Batch work and interactive requests by turns: what one teaches does not spoil the other."""

from __future__ import annotations

import random

from chiron_engine.policy.iteration.adaptive_autoscaler import AdaptiveAutoscaler
from chiron_engine.policy.iteration.local_autoscaler import EngineCapacity, ItlTargets
from tests.policy.iteration_plant import BATCH_1_S, COSTS, step_stats

CAPACITY = EngineCapacity(max_slots=512, max_step_tokens=8192, block_size=16, kv_capacity_tokens=400_000)
TARGETS = ItlTargets(1.5 * BATCH_1_S, 2.0)


class Engine:
    """Steps of a given make-up, one after another."""

    def __init__(self, autoscaler: AdaptiveAutoscaler) -> None:
        self.autoscaler = autoscaler
        self.now = 0.0
        self.step = 0
        self.dice = random.Random(0)

    def run(self, steps: int, n: int, prompt: int, interactive: int) -> None:
        for _ in range(steps):
            seconds = COSTS.seconds(n, 1000 * n, prompt, 1000 * prompt) * self.dice.lognormvariate(0.0, 0.01)
            self.now += seconds
            self.step += 1
            limits = self.autoscaler.limits
            self.autoscaler.on_step(
                step_stats(
                    self.step, self.now, seconds, n=n, kv=1000 * n, prompt=prompt, context=1000 * prompt,
                    interactive=interactive, batch=n - interactive, queued=50_000, due=self.now + 5.0,
                    max_running=limits.max_running, token_budget=limits.token_budget,
                ),
                self.now,
            )  # fmt: skip


def test_limits_come_back_after_batch_work() -> None:
    autoscaler = AdaptiveAutoscaler(CAPACITY, TARGETS, COSTS)
    engine = Engine(autoscaler)
    engine.run(1500, 20, 64, interactive=20)
    before = autoscaler.limits
    engine.run(1500, 300, 7000, interactive=0)
    assert autoscaler.limits.max_running > 300
    autoscaler.on_interactive(engine.now)
    assert autoscaler.limits.shrink == "preempt"
    assert 0.8 * before.max_running <= autoscaler.limits.max_running <= 1.1 * before.max_running


def test_steps_planned_before_a_change_do_not_count() -> None:
    """The step under way when the first interactive request comes is as long as batch work made it:
    no reason to hold the steps after it shorter."""
    autoscaler = AdaptiveAutoscaler(CAPACITY, TARGETS, COSTS)
    engine = Engine(autoscaler)
    engine.run(1500, 20, 64, interactive=20)
    settled = autoscaler.limits.max_running
    for _ in range(60):
        engine.run(20, 300, 7000, interactive=0)
        autoscaler.on_interactive(engine.now)
        engine.run(1, 300, 7000, interactive=1)
        engine.run(60, 20, 64, interactive=20)
    assert autoscaler.limits.max_running >= 0.9 * settled
