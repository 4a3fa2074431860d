"""An engine in a few lines: requests decode, prompts are computed, a step takes what a function says."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from chiron_engine.policy.iteration.local_autoscaler import LocalAutoscaler
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.policy.iteration.step_stats import StepStats

COSTS = StepCosts(6e-3, 1e-5, 4e-8, 2e-5, 1e-9)
"""About an 8B model on one H100."""
BATCH_1_S = COSTS.seconds(1, 1024)


def step_stats(
    step: int,
    now: float,
    itl_s: float,
    *,
    n: int = 10,
    kv: int = 3000,
    prompt: int = 0,
    context: int = 0,
    running: int | None = None,
    max_running: int = 64,
    token_budget: int = 256,
    queued: int = 0,
    due: float = math.inf,
    interactive: int | None = None,
    batch: int = 0,
    finished: int = 0,
    swapped: int = 0,
) -> StepStats:
    interactive = n if interactive is None else interactive
    return StepStats(
        step=step,
        time=now,
        prefill_tokens=prompt,
        prefill_context=context,
        decode_requests=n,
        kv_tokens=kv,
        swap_out_blocks=swapped,
        swap_in_blocks=0,
        plan_s=0.0,
        submit_s=0.0,
        wait_s=itl_s,
        device_s=itl_s,
        commit_s=0.0,
        graph=False,
        running=n if running is None else running,
        waiting=0,
        free_blocks=1000,
        finished=finished,
        preempted=0,
        max_running=max_running,
        token_budget=token_budget,
        itl_s=itl_s if n else 0.0,
        itl_interactive=min(n, interactive),
        itl_batch=n - min(n, interactive),
        queued_tokens=queued,
        queued_interactive_tokens=queued if interactive else 0,
        first_token_due=due,
        interactive_requests=interactive,
        batch_requests=batch,
    )


@dataclass(slots=True)
class Plant:
    """A closed load of `level` requests, each of 100 prompt and 200 output tokens on average.

    obeys: whether max_running is enforced. Limits take effect on the next step.
    """

    autoscaler: LocalAutoscaler
    seconds: Callable[[int, int, int, int], float] = COSTS.seconds
    level: int = 400
    noise: float = 0.0
    interactive: bool = True
    obeys: bool = True
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    now: float = 0.0
    step: int = 0
    tokens: int = 0
    changes: int = 0
    times: list[float] = field(default_factory=list)
    decoding: list[list[int]] = field(default_factory=list)
    """[KV length, outputs left] of each."""
    prompts: list[list[int]] = field(default_factory=list)
    """[computed, left] of each."""

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.run_one()

    def run_one(self) -> None:
        limits = self.autoscaler.limits
        most = min(self.level, limits.max_running if self.obeys else self.level)
        while len(self.decoding) + len(self.prompts) < most:
            self.prompts.append([0, 100])
        n, kv = len(self.decoding), sum(kv for kv, _ in self.decoding)
        prompt, context = self._advance_prompts(max(0, limits.token_budget - n))
        self.decoding = [[kv + 1, left - 1] for kv, left in self.decoding if left > 1]
        finished = n - len(self.decoding)
        ready = [p for p in self.prompts if not p[1]]
        self.prompts = [p for p in self.prompts if p[1]]
        self.decoding += [[done, self.rng.randint(50, 350)] for done, _ in ready]
        taken = self.seconds(n, kv, prompt, context) * math.exp(self.rng.gauss(0.0, self.noise))
        self.now += taken
        self.step += 1
        self.tokens += n
        self.times.append(taken)
        stats = step_stats(
            self.step,
            self.now,
            taken,
            n=n,
            kv=kv,
            prompt=prompt,
            context=context,
            running=n - finished + len(self.prompts) + len(ready),
            max_running=limits.max_running,
            token_budget=limits.token_budget,
            queued=100 * max(0, self.level - n),
            interactive=self.level if self.interactive else 0,
            batch=0 if self.interactive else self.level,
            finished=finished,
        )
        self.changes += self.autoscaler.on_step(stats, self.now) is not None

    def _advance_prompts(self, budget: int) -> tuple[int, int]:
        prompt = context = 0
        for state in self.prompts:
            count = min(state[1], budget - prompt)
            if count <= 0:
                break
            state[0] += count
            state[1] -= count
            prompt += count
            context += count * state[0]
        return prompt, context
