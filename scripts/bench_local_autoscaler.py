#!/usr/bin/env python3
"""How near `adaptive` comes to the best fixed limits, on one simulated engine, per profile and SLO.

The real engine core runs in virtual time over a profile's step times. The load is closed: `level`
requests are in the engine at any time, of ShareGPT-like lengths, and the level steps between more
than may run and a quarter of that; all are interactive, with the ITL SLO under test and time enough
for the first token. With --long-prompts, prompts of 8,192 tokens go before them every few seconds.

The best fixed pair (max_running, prompt tokens a step beside them) is found by sweep: for each prompt
budget the largest max_running whose run keeps 99 % of tokens inside the SLO, after 200 steps; the pair
with the highest throughput wins. Throughput is output tokens a second while the load saturates,
from step 1,000 on. `paper` runs with the best pair's prompt budget and with none.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.latency_model import LatencyModelExecutor
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.local_autoscaler import (
    EngineCapacity,
    ItlTargets,
    LocalAutoscaler,
    make_local_autoscaler,
)
from chiron_engine.policy.iteration.request import Request, Slo
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.policy.iteration.step_stats import StepStats
from chiron_engine.sim.profile import Profile
from chiron_engine.sim.profiles import load_profile, profile_names

BLOCK_SIZE = 16
BATCH_1_CONTEXT = 1024
SETTLED_STEP = 200
TRUSTED_STEP = 1000
SHARE = 0.99
LONG_PROMPT = 8192
PROMPT_BUDGETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What every autoscaler is run on."""

    profile: Profile
    itl_slo_s: float
    steps: int
    noise: float
    long_prompt_every_s: float
    lengths: str
    seed: int


@dataclass(slots=True)
class Measured:
    """inside: share of tokens within the SLO after 200 steps. tokens_per_s: while saturated, from step
    1,000 on. changes: of limits, from step 1,000 on."""

    inside: float
    tokens_per_s: float
    max_running: int
    token_budget: int
    changes: int
    mean_n: float


def request_lengths(kind: str, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Endless (prompt, output) lengths: log-normal with the mean, median and range of the data set."""
    if kind == "sharegpt":
        while True:
            prompt = int(rng.lognormvariate(math.log(30), 1.6))
            output = int(rng.lognormvariate(math.log(266), 0.5))
            yield min(max(prompt, 4), 1024), min(max(output, 4), 1742)
    while True:
        prompt = int(rng.lognormvariate(math.log(1020), 0.6))
        output = int(rng.lognormvariate(math.log(150), 0.8))
        yield min(max(prompt, 16), 6000), min(max(output, 4), 1000)


@dataclass(slots=True)
class Tally:
    """What the steps of a run add up to."""

    slo_s: float
    tokens: int = 0
    late: int = 0
    saturated_tokens: int = 0
    saturated_s: float = 0.0
    saturated_steps: int = 0
    saturated: bool = True
    steps: int = 0

    def add(self, stats: StepStats) -> None:
        self.steps += 1
        if self.steps > SETTLED_STEP and stats.decode_requests:
            self.tokens += stats.decode_requests
            if stats.itl_s > self.slo_s * (1 + 1e-9):
                self.late += stats.decode_requests
        if self.steps > TRUSTED_STEP and self.saturated:
            self.saturated_tokens += stats.decode_requests
            self.saturated_s += stats.itl_s or stats.device_s
            self.saturated_steps += 1


class Bench:
    """One engine under the scenario's load."""

    def __init__(self, scenario: Scenario, autoscaler: LocalAutoscaler) -> None:
        self.scenario = scenario
        self.autoscaler = autoscaler
        profile = scenario.profile
        self.shape = ExecutorShape(
            block_size=BLOCK_SIZE,
            num_device_blocks=profile.kv_capacity_tokens // BLOCK_SIZE,
            num_host_blocks=0,
            max_slots=profile.max_slots,
            max_step_tokens=profile.max_step_tokens,
            max_model_len=profile.max_model_len,
            vocab_size=32_000,
        )
        self.clock = VirtualClock()
        self._outputs: dict[int, int] = {}
        executor = LatencyModelExecutor(
            self.shape,
            profile.step_times,
            self.clock,
            output_tokens=lambda request: self._outputs[request.request_id],
            noise=scenario.noise,
            seed=scenario.seed,
        )
        self.core = EngineCore(
            executor,
            clock=self.clock,
            local_autoscaler=autoscaler,
            enable_prefix_caching=False,
            max_queued_requests=1 << 20,
            max_queued_tokens=1 << 40,
        )
        self.tally = Tally(scenario.itl_slo_s)
        self.late_bound = math.inf
        """Late tokens at which the run is given up."""
        self.core.add_step_hook(self.tally.add)
        self._rng = random.Random(scenario.seed)
        self._lengths = request_lengths(scenario.lengths, self._rng)
        self._next_long = scenario.long_prompt_every_s or math.inf

    def run(self) -> Measured:
        changes = 0
        most = self.shape.max_slots + 64
        for step in range(self.scenario.steps):
            phase = step * 10 // self.scenario.steps
            level = most // 8 if phase in (3, 6) else most
            self._fill(level)
            before = self.autoscaler.limits
            # Saturated: requests wait although the level has been up for a while.
            self.tally.saturated = level == most and phase not in (4, 7)
            self.core.step()
            if self.tally.late > self.late_bound:
                break
            changes += step >= TRUSTED_STEP and self.autoscaler.limits is not before
        tally, limits = self.tally, self.autoscaler.limits
        return Measured(
            1 - tally.late / max(1, tally.tokens),
            tally.saturated_tokens / tally.saturated_s if tally.saturated_s else math.nan,
            limits.max_running,
            limits.token_budget,
            changes,
            tally.saturated_tokens / max(1, tally.saturated_steps),
        )

    def _fill(self, level: int) -> None:
        scheduler = self.core.scheduler
        while len(scheduler.running) + len(scheduler.waiting) < level:
            self._add(*next(self._lengths))
        if self.clock.now() >= self._next_long:
            self._next_long += self.scenario.long_prompt_every_s
            self._add(LONG_PROMPT, 200, urgent=True)

    def _add(self, prompt: int, output: int, urgent: bool = False) -> None:
        request_id = len(self._outputs)
        self._outputs[request_id] = output
        now = self.clock.now()
        self.core.add(
            Request(
                request_id=request_id,
                prompt_ids=range(prompt),
                sampling=SamplingParams(temperature=0.0),
                max_tokens=min(2048, self.shape.max_model_len - prompt),
                slo=Slo(ttft_s=60.0, itl_s=self.scenario.itl_slo_s),
                # An arrival time of long ago puts it before the backlog.
                arrival=-1.0 if urgent else now,
            )
        )


def measure(scenario: Scenario, name: str, fixed: Limits | None = None, prior: bool = True) -> Measured:
    profile = scenario.profile
    capacity = EngineCapacity(
        profile.max_slots, profile.max_step_tokens, BLOCK_SIZE, profile.kv_capacity_tokens
    )
    targets = ItlTargets(scenario.itl_slo_s, 10.0)
    autoscaler = make_local_autoscaler(name, capacity, targets, profile.fit if prior else None, fixed)
    bench = Bench(scenario, autoscaler)
    if name == "fixed" and fixed is not None:
        # No run with this limit has more tokens than this, so more late ones are too many.
        bench.late_bound = (1 - SHARE) * fixed.max_running * scenario.steps
    gc.disable()
    measured = bench.run()
    gc.enable()
    gc.collect()
    return measured


@dataclass(slots=True)
class BestFixed:
    """The best of the fixed pairs tried, and how many were."""

    measured: Measured | None = None
    prompt_budget: int = 0
    tried: int = 0
    by_budget: dict[int, tuple[int, float]] = field(default_factory=dict)


def find_best_fixed(scenario: Scenario, guess: Measured) -> BestFixed:
    """From the prompt budget of `guess` outwards, as long as throughput rises."""
    best = BestFixed()
    start = max(16, guess.token_budget - guess.max_running)
    first = min(range(len(PROMPT_BUDGETS)), key=lambda i: abs(math.log(PROMPT_BUDGETS[i] / start)))
    n = _largest_running(scenario, PROMPT_BUDGETS[first], guess.max_running, best)
    for direction in (1, -1):
        index, falls, at = first + direction, 0, n
        while 0 <= index < len(PROMPT_BUDGETS) and falls < 1:
            before = best.measured.tokens_per_s if best.measured else 0.0
            at = _largest_running(scenario, PROMPT_BUDGETS[index], at, best)
            now = best.measured.tokens_per_s if best.measured else 0.0
            falls = falls + 1 if now <= before else 0
            index += direction
    if best.prompt_budget:
        for factor in (0.75, 1.4):
            _largest_running(scenario, int(best.prompt_budget * factor), n, best)
    return best


def _largest_running(scenario: Scenario, prompt: int, guess: int, best: BestFixed) -> int:
    """The largest max_running that keeps the SLO with this prompt budget, by bisection from `guess`."""
    profile = scenario.profile
    most = min(profile.max_slots, profile.max_step_tokens - prompt)

    def keeps(n: int) -> bool:
        measured = measure(scenario, "fixed", Limits(n, n + prompt))
        best.tried += 1
        if measured.inside < SHARE:
            return False
        if best.measured is None or measured.tokens_per_s > best.measured.tokens_per_s:
            best.measured, best.prompt_budget = measured, prompt
        if n >= best.by_budget.get(prompt, (0, 0.0))[0]:
            best.by_budget[prompt] = (n, round(measured.tokens_per_s, 1))
        return True

    low, high = 0, most + 1
    n, stride = min(max(1, guess), most), max(1, guess // 12)
    while low < high - 1:
        if keeps(n):
            low = n
            n = min(n + stride, high - 1) if high == most + 1 else (low + high) // 2
        else:
            high = n
            n = max(n - stride, 1) if low == 0 else (low + high) // 2
        stride *= 2
        if high - low <= max(1, high // 48):
            break
        n = min(max(n, low + 1), high - 1)
    return max(low, 1)


def batch_1_step_s(profile: Profile) -> float:
    return profile.step_times.seconds(1, BATCH_1_CONTEXT, 0, 0)


def long_prompt_interval_s(profile: Profile, share: float) -> float:
    if not share:
        return 0.0
    return max(2.0, profile.step_times.seconds(0, 0, LONG_PROMPT, LONG_PROMPT**2) / share)


def row(scenario: Scenario, ratio: float, tell: Callable[[str], None]) -> dict[str, object]:
    adaptive = measure(scenario, "adaptive")
    unprimed = measure(scenario, "adaptive", prior=False)
    best = find_best_fixed(scenario, adaptive)
    fixed = best.measured
    budget = best.prompt_budget or 512
    slots = scenario.profile.max_slots
    paper = measure(scenario, "paper", Limits(1, min(slots + budget, scenario.profile.max_step_tokens)))
    against = fixed.tokens_per_s if fixed else math.nan
    tell(
        f"{scenario.profile.name:32} {ratio:4.1f} "
        f"{adaptive.inside:7.2%} {adaptive.tokens_per_s / against:6.1%} {adaptive.mean_n:6.1f} "
        f"{adaptive.changes:5d}  {unprimed.inside:7.2%} {unprimed.tokens_per_s / against:6.1%}  "
        f"{paper.inside:7.2%} {paper.tokens_per_s / against:6.1%}   "
        + (f"{fixed.max_running}+{best.prompt_budget} n={fixed.mean_n:.1f}" if fixed else "none keeps it")
        + f" {against:.0f}/s"
    )
    return {
        "profile": scenario.profile.name,
        "slo_ratio": ratio,
        "itl_slo_ms": scenario.itl_slo_s * 1e3,
        "adaptive": asdict(adaptive),
        "adaptive_without_prior": asdict(unprimed),
        "paper": asdict(paper),
        "best_fixed": asdict(fixed) if fixed else None,
        "best_fixed_prompt_budget": best.prompt_budget,
        "fixed_pairs_tried": best.tried,
        "adaptive_over_best": adaptive.tokens_per_s / against,
        "paper_over_best": paper.tokens_per_s / against,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--profiles", nargs="*", default=None, help="names; default: all packaged")
    parser.add_argument("--slo-ratio", nargs="*", type=float, default=[1.5, 3.0], help="of the batch-1 step")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--noise", type=float, default=0.0, help="sigma of log-normal step-time noise")
    parser.add_argument(
        "--long-prompts",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="8,192-token prompts, so often that computing them alone takes this share of the time\n"
        "(every 2 s at most); 0.05 is one every few seconds",
    )
    parser.add_argument("--lengths", choices=("sharegpt", "azure"), default="sharegpt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="- for stdout")
    args = parser.parse_args()

    def tell(line: str) -> None:
        print(line, file=sys.stderr if args.json == "-" else sys.stdout, flush=True)

    started = time.perf_counter()
    tell(
        f"{'profile':32} {'SLO':>4} {'adaptive: in':>12} {'/best':>4} {'n':>4} {'moves':>5} "
        f"{' no prior: in':>12} {'/best':>5} {'  paper: in':>9} {'/best':>5}   best fixed"
    )
    rows = []
    for name in args.profiles if args.profiles is not None else profile_names():
        for ratio in args.slo_ratio:
            profile = load_profile(name)
            scenario = Scenario(
                profile,
                ratio * batch_1_step_s(profile),
                args.steps,
                args.noise,
                long_prompt_interval_s(profile, args.long_prompts),
                args.lengths,
                args.seed,
            )
            rows.append(row(scenario, ratio, tell))
    tell(f"{time.perf_counter() - started:.0f} s")
    if args.json == "-":
        print(json.dumps(rows, indent=1))
    elif args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
