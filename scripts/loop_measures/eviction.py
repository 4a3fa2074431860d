"""An interactive request that meets an engine full of batch work, and what eviction costs that work."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from chiron_engine.config import EngineConfig
from chiron_engine.policy.iteration.plan import StepPlan
from chiron_engine.policy.iteration.request import Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import GREEDY
from chiron_engine.policy.iteration.scheduler import MAX_EVICTIONS
from chiron_engine.policy.iteration.step_stats import StepStats
from chiron_engine.serving.core_setup import build_core
from chiron_engine.serving.engine_loop import EngineLoop, LoopOutput

from .engines import Plant, WatchedExecutor, real_plant, simulated_plant
from .measured import Measured, Options, milliseconds
from .processes import PROFILE

ARRIVALS = 30
SLOTS = {"simulated": 32, "real": 8}
WAITING = 4
BATCH_PROMPT, BATCH_OUTPUT = 64, 600
PROMPT, OUTPUT = 48, 4
ITL_S = 2.0
QUIET_STEPS = 3
BETWEEN_STEPS_S = 5e-4
"""What the loop may take between two steps to hand out tokens and take in requests."""
SATURATED_S = 60.0
GIB = 1 << 30


@dataclass(slots=True)
class Resume:
    """kept: tokens whose KV there was when the request was evicted; found: of them, when it resumed."""

    kept: int
    found: int

    @property
    def recomputed(self) -> int:
        return self.kept - self.found


@dataclass(slots=True)
class Arrival:
    """allowed_s: a step, and the steps its prompt took. others: steps between its arrival and its first
    token that computed nothing of it."""

    ttft_s: float
    own_s: float
    allowed_s: float
    others: int


@dataclass(slots=True)
class Record:
    """What the thread of the loop saw. stats: by step. chunks: steps that computed some of a prompt, by
    request."""

    stats: dict[int, StepStats] = field(default_factory=dict)
    chunks: dict[int, list[int]] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)
    resumes: list[Resume] = field(default_factory=list)
    quiet: int = 0

    def plan(self, plan: StepPlan) -> None:
        for request in plan.preempted:
            # Saturated means that nobody's prompt is under way: all but the last token have KV.
            self.kept[request.request_id] = request.tokens_at(plan.step) - 1
        for joined in plan.joined:
            kept = self.kept.pop(joined.request.request_id, None)
            if kept is not None:
                self.resumes.append(Resume(kept, joined.num_computed))
        for request in plan.chunk_requests:
            self.chunks.setdefault(request.request_id, []).append(plan.step)

    def step(self, stats: StepStats) -> None:
        self.stats[stats.step] = stats
        self.quiet = 0 if stats.prefill_tokens else self.quiet + 1

    def arrival(self, request: Request) -> Arrival:
        first = request.first_token
        assert first is not None  # it has ended
        own = self.chunks[request.request_id]
        between = [s for s in self.stats.values() if request.arrival < s.time <= first]
        others = [s for s in between if s.step not in own]
        own_s = sum(duration_s(self.stats[step]) for step in own if step in self.stats)
        one_step = max((duration_s(s) for s in others[:1]), default=0.0)
        return Arrival(first - request.arrival, own_s, one_step + own_s, len(others))


def duration_s(stats: StepStats) -> float:
    """Of a step, from its planning to its commit."""
    return stats.plan_s + stats.submit_s + stats.wait_s + stats.commit_s


class SaturatedEngine:
    """An engine whose batch requests are always more than its slots; a context manager."""

    def __init__(self, plant: Plant, seed: int) -> None:
        self.record = Record()
        self._rng = random.Random(seed)
        self._core = build_core(
            plant.config,
            WatchedExecutor(plant.executor, self.record.plan),
            swap_costs=plant.swap_costs,
            costs=plant.costs,
        )
        self._core.hand_back_evicted = True
        self._core.add_step_hook(self.record.step)
        self._loop = EngineLoop(self._core)
        self._slots = plant.executor.shape.max_slots
        self._vocabulary = plant.executor.shape.vocab_size
        self._ids = 0
        self._evicted: list[Request] = []
        self._resumed: list[Request] = []
        self._ended = threading.Event()
        self._is_stopping = False
        self._loop.subscribe(self._receive)

    def __enter__(self) -> SaturatedEngine:
        self._loop.start()
        for _ in range(self._slots + WAITING):
            self._submit(SloClass.BATCH, BATCH_PROMPT, self._rng.randrange(BATCH_OUTPUT // 2, BATCH_OUTPUT))
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopping = True
        self._loop.stop()
        self._loop.ended.result()

    def arrive(self) -> Arrival:
        """Wait until the engine is full, send an interactive request and give what it drove out back."""
        self.wait_saturated()
        self._replace_immune()
        self.wait_saturated()
        step_s = duration_s(self.record.stats[max(self.record.stats)])
        time.sleep(self._rng.random() * step_s)
        self._ended.clear()
        request = self._submit(SloClass.INTERACTIVE, PROMPT, OUTPUT)
        if not self._ended.wait(SATURATED_S):
            raise RuntimeError(f"an interactive request had no end within {SATURATED_S:g} s")
        self._resumed, self._evicted = self._evicted, []
        for victim in self._resumed:
            self._loop.submit(victim)
        return self.record.arrival(request)

    def _replace_immune(self) -> None:
        """End what would not give way again, which is then as if done: others take its place."""
        self._loop.abort([r.request_id for r in self._resumed if r.num_preempted >= MAX_EVICTIONS])
        self._resumed = []

    def wait_saturated(self) -> None:
        """All slots taken, others waiting, and nobody's prompt under way, for some steps."""
        self.record.quiet = 0
        end = time.monotonic() + SATURATED_S
        while True:
            load = self._loop.load
            if load.running == self._slots and load.waiting and self.record.quiet >= QUIET_STEPS:
                return
            if time.monotonic() > end:
                raise RuntimeError(f"{load.running} of {self._slots} slots are taken, {load.waiting} wait")
            time.sleep(1e-3)

    def _submit(self, slo_class: SloClass, prompt: int, output: int) -> Request:
        self._ids += 1
        request = Request(
            self._ids,
            [self._rng.randrange(self._vocabulary) for _ in range(prompt)],
            GREEDY,
            output,
            slo=Slo(slo_class),
            arrival=self._loop.clock.now(),
        )
        self._loop.submit(request)
        return request

    def _receive(self, output: LoopOutput) -> None:
        self._evicted += output.step.handed_back
        for request in output.step.finished:
            if request.slo.slo_class is SloClass.INTERACTIVE:
                self._ended.set()
            elif not self._is_stopping:
                self._submit(SloClass.BATCH, BATCH_PROMPT, BATCH_OUTPUT)


def measure(options: Options) -> Measured:
    measured = Measured()
    measured.notes.append(
        f"{options.count(ARRIVALS)} interactive requests of {PROMPT} tokens, each at a random moment of a "
        "step of an engine whose slots batch requests hold; those evicted come back once it has ended"
    )
    measured.notes.append(
        f"both classes have an ITL target of {ITL_S:g} s, so that the limits stay; a batch request that gave "
        f"way {MAX_EVICTIONS} times keeps its place from then on, and is replaced by another here"
    )
    with ExitStack() as resources:
        for plant in (_simulated(), _real(options, resources)):
            with SaturatedEngine(plant, options.seed) as engine:
                arrivals = [engine.arrive() for _ in range(options.count(ARRIVALS))]
                engine.wait_saturated()  # the last victims have resumed
            _judge(measured, plant, arrivals, engine.record)
    return measured


def _simulated() -> Plant:
    config = EngineConfig("simulated", executor="simulated", profile=PROFILE, max_num_seqs=SLOTS["simulated"])
    return simulated_plant(config)


def _real(options: Options, resources: ExitStack) -> Plant:
    config = EngineConfig(
        options.model,
        device="cpu",
        dtype=options.dtype,
        max_num_seqs=SLOTS["real"],
        kv_cache_memory=GIB,
        itl_slo_s=ITL_S,
        batch_itl_slo_s=ITL_S,
    )
    return real_plant(config, resources)


def _judge(measured: Measured, plant: Plant, arrivals: Sequence[Arrival], record: Record) -> None:
    late = [a for a in arrivals if a.ttft_s > a.allowed_s + BETWEEN_STEPS_S]
    waited = max(a.others for a in arrivals)
    recomputed = [resume.recomputed for resume in record.resumes]
    block = plant.executor.shape.block_size
    measured.rows.append(
        {
            "engine": plant.name,
            "TTFT ms\np50 / p99": milliseconds([a.ttft_s for a in arrivals]),
            "its own steps ms\np50 / p99": milliseconds([a.own_s for a in arrivals]),
            "a step and its own ms\np50 / p99": milliseconds([a.allowed_s for a in arrivals]),
            "other steps\nat most": str(waited),
            "evicted and\nresumed": str(len(recomputed)),
            "tokens of KV\nrecomputed, most": str(max(recomputed, default=0)),
        }
    )
    measured.judge(
        f"{plant.name}: first token within one step and its own prefill",
        f"{len(arrivals) - len(late)} of {len(arrivals)}, at most {waited} other step before its own",
        not late and waited <= 1,
    )
    measured.judge(
        f"{plant.name}: evicted work recomputes no full block where it resumes",
        f"at most {max(recomputed, default=0)} tokens of blocks of {block}, {len(recomputed)} resumed",
        bool(recomputed) and max(recomputed) < block,
    )
    measured.figures[plant.name] = {
        "ttft_s": [a.ttft_s for a in arrivals],
        "allowed_s": [a.allowed_s for a in arrivals],
        "other_steps": [a.others for a in arrivals],
        "resumed": len(recomputed),
        "recomputed_tokens": recomputed,
    }
