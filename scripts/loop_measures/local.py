"""`adaptive` on a real model, against the best fixed limits found by a sweep in the same run."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.policy.iteration.autoscaler_inputs import EngineCapacity, ItlTargets
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.local_autoscaler import make_local_autoscaler
from chiron_engine.policy.iteration.request import Request, Slo
from chiron_engine.policy.iteration.sampling_params import GREEDY
from chiron_engine.policy.iteration.step_stats import StepStats
from scripts.bench_local_autoscaler import request_lengths

from .engines import Plant, real_plant
from .measured import Measured, Options

SLOTS = 64
STEP_TOKENS = 512
KV_BYTES = 2 << 30
LEVELS = ((4, 5.0), (64, 24.0), (8, 5.0))
"""Requests in the engine at any time, and for how many seconds after SETTLED_S."""
SETTLED_S = 3.0
TYPICAL_CONTEXT = 160
SHARE, OF_BEST = 0.99, 0.95
SWEEP_UNTIL_S = 240.0
BATCH_ITL_S = 10.0
FACTORS = ((1.0, 1.0), (1.2, 1.0), (1.0, 2.0), (0.85, 1.0), (1.0, 0.5), (1.2, 2.0), (1.4, 1.0))


@dataclass(slots=True)
class Run:
    """inside: share of steps with decodes inside the SLO, from SETTLED_S on. tokens_per_s: of output, at the
    highest level, once settled. limits: the pair in the middle of what was in force meanwhile."""

    name: str
    inside: float
    steps: int
    tokens_per_s: float
    max_running: int
    prompt_budget: int


@dataclass(slots=True)
class Tally:
    """Of the steps of one run, on the engine's clock."""

    slo_s: float
    settled_at: float
    steps: int = 0
    inside: int = 0
    limits: list[tuple[int, int]] = field(default_factory=list)

    def add(self, stats: StepStats) -> None:
        if stats.time >= self.settled_at and stats.decode_requests:
            self.steps += 1
            self.inside += stats.itl_s <= self.slo_s


class ClosedLoad:
    """Keeps so many requests in an engine: one that ends is followed by another, and those over the
    level are given up by their clients, the last to come first."""

    def __init__(self, core: EngineCore, slo_s: float, seed: int) -> None:
        self._core = core
        self._slo = Slo(ttft_s=10.0, itl_s=slo_s)
        self._rng = random.Random(seed)
        self._lengths = request_lengths("sharegpt", self._rng)
        self._live: dict[int, Request] = {}
        self._ids = 0

    def set_level(self, level: int) -> None:
        """Those that come now are somewhere in their output, as if they had been there before: else all
        would end, and the next begin, at once."""
        for request_id in list(self._live)[level:]:
            self._core.abort(request_id)
            del self._live[request_id]
        while len(self._live) < level:
            self._add(self._rng.random())

    def step(self) -> int:
        """One step; returns how many tokens came."""
        output = self._core.step()
        for request in output.finished:
            if self._live.pop(request.request_id, None) is not None:
                self._add(1.0)
        return len(output.requests)

    def leave(self) -> None:
        """Take every request out, and the executor's slots with them."""
        self.set_level(0)
        while self._core.has_work:
            self._core.step()

    def _add(self, share: float) -> None:
        prompt, output = next(self._lengths)
        self._ids += 1
        vocabulary = self._core.shape.vocab_size
        request = Request(
            self._ids,
            [self._rng.randrange(vocabulary) for _ in range(prompt)],
            GREEDY,
            max(2, round(output * share)),
            slo=self._slo,
            arrival=self._core.clock.now(),
        )
        self._live[self._ids] = request
        self._core.add(request)


def step_seconds(plant: Plant, requests: int) -> float:
    """Median step of so many decoding requests at a typical context."""
    from chiron_engine.runtime.torch_executor import TorchExecutor
    from chiron_engine.runtime.trial_steps import TrialRequests

    assert isinstance(plant.executor, TorchExecutor)  # a real plant has it
    trial = TrialRequests(plant.executor, requests, TYPICAL_CONTEXT, 16)
    trial.prefill(start=TYPICAL_CONTEXT - 1)
    seconds = [trial.decode() for _ in range(12)]
    trial.leave()
    return statistics.median(seconds[2:])


def run(plant: Plant, options: Options, slo_s: float, name: str, fixed: Limits | None = None) -> Run:
    core = _core(plant, slo_s, fixed)
    load = ClosedLoad(core, slo_s, options.seed)
    began = core.clock.now()
    tally = Tally(slo_s, began + SETTLED_S)
    core.add_step_hook(tally.add)
    most = max(level for level, _ in LEVELS)
    rate, limits = 0.0, []
    for level, stated_s in LEVELS:
        load.set_level(level)
        settles, end = core.clock.now() + SETTLED_S, core.clock.now() + SETTLED_S + options.seconds(stated_s)
        tokens, counted_from = 0, settles
        while (now := core.clock.now()) < end:
            came = load.step()
            if now < settles:
                counted_from = core.clock.now()
            else:
                tokens += came
                if level == most:
                    limits.append(core.scheduler.limits)
        if level == most:
            rate = tokens / (core.clock.now() - counted_from)
    load.leave()
    running = round(statistics.median(pair.max_running for pair in limits))
    budget = round(statistics.median(pair.token_budget for pair in limits))
    return Run(name, tally.inside / max(1, tally.steps), tally.steps, rate, running, budget - running)


def _core(plant: Plant, slo_s: float, fixed: Limits | None) -> EngineCore:
    """A core of its own for each run, over the same executor, which every run leaves empty."""
    shape = plant.executor.shape
    capacity = EngineCapacity(
        shape.max_slots, shape.max_step_tokens, shape.block_size, shape.num_device_blocks * shape.block_size
    )
    autoscaler = make_local_autoscaler(
        "fixed" if fixed else "adaptive", capacity, ItlTargets(slo_s, BATCH_ITL_S), plant.costs, fixed
    )
    return EngineCore(
        plant.executor,
        local_autoscaler=autoscaler,
        swap_costs=plant.swap_costs,
        enable_prefix_caching=False,
    )


def neighbours(around: Run) -> Iterator[tuple[int, int]]:
    """(max_running, prompt budget) to try, the likeliest first, from where `adaptive` settled."""
    n, p = around.max_running, max(8, around.prompt_budget)
    for running, budget in FACTORS:
        pair = min(SLOTS, max(1, round(n * running))), max(1, round(p * budget))
        yield pair[0], min(pair[1], STEP_TOKENS - pair[0])


def best_of(fixed: list[Run], adaptive: Run) -> Run:
    """The highest throughput of those that keep the SLO as well as asked, or as `adaptive` does where that
    is less, or at least as well as any."""
    wanted = min(SHARE, adaptive.inside, max(run.inside for run in fixed))
    return max((run for run in fixed if run.inside >= wanted), key=lambda run: run.tokens_per_s)


def measure(options: Options) -> Measured:
    measured = Measured()
    config = EngineConfig(
        options.model,
        device="cpu",
        dtype=options.dtype,
        max_num_seqs=SLOTS,
        max_num_batched_tokens=STEP_TOKENS,
        kv_cache_memory=KV_BYTES,
        swap_space=0,
    )
    began = time.monotonic()
    with ExitStack() as resources:
        plant = real_plant(config, resources)
        one, many = step_seconds(plant, 1), step_seconds(plant, SLOTS)
        slo_s = (one + many) / 2
        adaptive = run(plant, options, slo_s, "adaptive")
        fixed: list[Run] = []
        for running, budget in dict.fromkeys(neighbours(adaptive)):
            if fixed and time.monotonic() - began > SWEEP_UNTIL_S:
                measured.notes.append(f"the sweep was ended after {len(fixed)} pairs, for time")
                break
            limits = Limits(running, running + budget)
            fixed.append(run(plant, options, slo_s, f"fixed {running}+{budget}", limits))
        again = run(plant, options, slo_s, "adaptive again")
    levels = " -> ".join(str(level) for level, _ in LEVELS)
    measured.notes.append(
        f"{plant.name}: a step of 1 takes {one * 1e3:.0f} ms, of {SLOTS} {many * 1e3:.0f}; ITL SLO "
        f"{slo_s * 1e3:.0f} ms; {levels} concurrent requests of ShareGPT-like lengths"
    )
    best = best_of(fixed, adaptive)
    for seen in (adaptive, *fixed, again):
        _row(measured, seen, best)
    _judge(measured, adaptive, again, best)
    measured.figures = {
        "step_1_s": one,
        "step_64_s": many,
        "itl_slo_s": slo_s,
        "best": best.name,
        "runs": [asdict(seen) for seen in (adaptive, *fixed, again)],
    }
    return measured


def _row(measured: Measured, seen: Run, best: Run) -> None:
    measured.rows.append(
        {
            "limits": seen.name + (" (best)" if seen is best else ""),
            "steps inside\nthe SLO %": f"{int(seen.inside * 10_000) / 100:.2f}",
            "steps": f"{seen.steps:,}",
            "tokens/s\nat 64": f"{seen.tokens_per_s:.1f}",
            "of the\nbest": f"{seen.tokens_per_s / best.tokens_per_s:.1%}",
            "limit +\nprompt budget": f"{seen.max_running}+{seen.prompt_budget}",
        }
    )


def _judge(measured: Measured, adaptive: Run, again: Run, best: Run) -> None:
    inside = min(adaptive.inside, again.inside)
    measured.judge(
        f"adaptive: {SHARE:.0%} of steps inside the SLO after {SETTLED_S:g} s",
        f"{adaptive.inside:.2%} and, again at the end, {again.inside:.2%}",
        inside >= SHARE,
    )
    share = (adaptive.tokens_per_s + again.tokens_per_s) / 2 / best.tokens_per_s
    measured.judge(
        f"adaptive: {OF_BEST:.0%} of the throughput of the best fixed pair",
        f"{share:.1%} of {best.name}, of which {best.inside:.2%} of steps were inside",
        share >= OF_BEST,
    )
