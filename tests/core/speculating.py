"""Engine cores that guess tokens, over executors whose steps take modelled time."""

from __future__ import annotations

import random
from collections.abc import Callable

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.core_settings import CoreSettings
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.latency_model import LatencyModelExecutor
from chiron_engine.policy.iteration.plan import StepPlan
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY, SamplingParams
from chiron_engine.policy.iteration.step_costs import StepCosts

VOCAB = 50
SHAPE = ExecutorShape(4, 4000, 0, 32, 512, 2000, VOCAB)
PROMPT = [3, 1, 4, 1, 5]
TokenAt = Callable[[int, int], int]
"""The output token of a request's seed at an index."""


def repeating(seed: int, index: int) -> int:
    return (seed + index % 11) % VOCAB


def misleading(seed: int, index: int) -> int:
    """The last two tokens stood somewhere before, most often, and something else followed."""
    return random.Random(1_000_003 * seed + index).randrange(5)


class TimedExecutor(LatencyModelExecutor):
    """Tokens of a function of seed and index; keeps its plans."""

    def __init__(self, costs: StepCosts, clock: VirtualClock, token_at: TokenAt, noise: float = 0.0) -> None:
        super().__init__(SHAPE, costs, clock, noise=noise, seed=1, scripted_tokens=True)
        self.plans: list[StepPlan] = []
        self._token_at = token_at

    def _tokens(self, plan: StepPlan) -> list[int]:
        self.plans.append(plan)
        requests = [(r, 1) for r in (*plan.decode.requests, *plan.sampled_requests)]
        requests += [(r, d.count) for r, d in zip(plan.draft_requests, plan.drafts, strict=True)]
        return [self._token_at(r.seed, len(r.output_ids) + i) for r, count in requests for i in range(count)]


def speculating_core(
    costs: StepCosts, token_at: TokenAt, guesses: int = 7, noise: float = 0.0
) -> tuple[EngineCore, TimedExecutor]:
    clock = VirtualClock()
    executor = TimedExecutor(costs, clock, token_at, noise)
    settings = CoreSettings(SHAPE, enable_prefix_caching=False, num_speculative_tokens=guesses)
    return settings.build(executor, clock), executor


def asked(
    number: int,
    max_tokens: int,
    sampling: SamplingParams = GREEDY,
    stop_ids: frozenset[int] = frozenset(),
    guide: object = None,
) -> Request:
    prompt = [*PROMPT, number % VOCAB]
    return Request(number, prompt, sampling, max_tokens, stop_ids=stop_ids, seed=number, guide=guide)


def run(core: EngineCore, requests: list[Request]) -> list[tuple[int, int]]:
    """Serve all; returns what was put out, (request, token) in order."""
    for request in requests:
        core.add(request)
    told: list[tuple[int, int]] = []
    while core.has_work:
        output = core.step()
        told += [(r.request_id, t) for r, t in zip(output.requests, output.tokens or [], strict=True)]
    return told
