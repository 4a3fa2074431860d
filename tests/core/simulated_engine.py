"""An engine core in virtual time, driven as a simulation drives one: arrivals come while steps run."""

from __future__ import annotations

from dataclasses import dataclass, field

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.latency_model import LatencyModelExecutor
from chiron_engine.policy.iteration.local_autoscaler import EngineCapacity, ItlTargets, make_local_autoscaler
from chiron_engine.policy.iteration.request import Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import GREEDY
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.policy.iteration.step_stats import StepStats

COSTS = StepCosts(0.006, 1e-5, 4e-8, 2e-5, 1e-9)
BLOCK = 16


@dataclass(frozen=True)
class Arrival:
    """`output` is the true length; the request itself may run to `most`."""

    when: float
    prompt: int
    output: int
    most: int
    batch: bool = False


@dataclass
class SimulatedEngine:
    blocks: int = 400
    host_blocks: int = 200
    slots: int = 32
    noise: float = 0.0
    autoscaler: str | None = None
    hand_back: bool = False
    core: EngineCore = field(init=False)
    clock: VirtualClock = field(init=False)
    stats: list[StepStats] = field(default_factory=list)
    finished: list[tuple[float, int]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    passed: int = 0

    def __post_init__(self) -> None:
        shape = ExecutorShape(
            BLOCK, self.blocks, self.host_blocks, self.slots, 512, self.blocks * BLOCK, vocab_size=1
        )
        self.clock = VirtualClock()
        executor = LatencyModelExecutor(
            shape,
            COSTS,
            self.clock,
            output_tokens=lambda request: request.client.output,  # type: ignore[attr-defined]
            copy_s_per_block=1e-5,
            noise=self.noise,
            seed=3,
        )
        capacity = EngineCapacity(self.slots, 512, BLOCK, self.blocks * BLOCK)
        targets = ItlTargets(0.012, 0.05)
        autoscaler = make_local_autoscaler(self.autoscaler, capacity, targets) if self.autoscaler else None
        self.core = EngineCore(
            executor,
            clock=self.clock,
            local_autoscaler=autoscaler,
            hand_back_evicted=self.hand_back,
            max_queued_tokens=1 << 40,
        )
        self.core.add_step_hook(self._keep)

    def _keep(self, stats: StepStats) -> None:
        self.stats.append(stats)

    def add(self, arrival: Arrival) -> None:
        slo = Slo(SloClass.BATCH if arrival.batch else SloClass.INTERACTIVE, ttft_s=1.0)
        most = min(arrival.most, self.core.shape.max_model_len - arrival.prompt)
        request = Request(
            len(self.requests),
            range(arrival.prompt),
            GREEDY,
            most,
            slo=slo,
            arrival=self.clock.now(),
            client=arrival,
        )
        self.requests.append(request)
        self.core.add(request)

    def run(self, arrivals: list[Arrival], fast: bool) -> None:
        """Serve all of them; evicted requests that leave come straight back."""
        for arrival in [*arrivals, None]:
            until = arrival.when if arrival is not None else float("inf")
            self._run_until(until, fast)
            if arrival is not None:
                self.clock.sleep_until(arrival.when)
                self.add(arrival)

    def _run_until(self, until: float, fast: bool) -> None:
        core = self.core
        while True:
            if core.completes_at is None:
                if fast:
                    self.passed += core.fast_forward(until)
                if not core.submit():
                    return
            completes_at = core.completes_at
            assert completes_at is not None
            if completes_at > until:
                return
            output = core.complete()
            self.finished += [(self.clock.now(), request.request_id) for request in output.finished]
            for request in output.handed_back:
                core.add(request)
