"""Late gaps, counted by the step, against the time of every single token."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.policy.iteration.plan import StepOutput
from chiron_engine.sim.faults import FaultSettings
from chiron_engine.sim.run_result import ITL_BINS, RunResult
from chiron_engine.sim.sim_policy import SimPolicy
from chiron_engine.sim.workload import ClassSlo, Workload, make_workload
from tests.sim.plain_fleet import plain_policy
from tests.sim.small_world import mixed_workload, small_profile, small_run, trace_of

RPC_S = 1e-3


def run_and_watch(
    monkeypatch: pytest.MonkeyPatch, workload: Workload, policy: SimPolicy, **settings: object
) -> tuple[RunResult, dict[int, list[float]]]:
    """The result, and when each request got its tokens."""
    tokens: dict[int, list[float]] = defaultdict(list)
    complete = EngineCore.complete

    def watched(core: EngineCore) -> StepOutput:
        output = complete(core)
        for request in output.requests:
            tokens[request.request_id].append(core.clock.now())
        return output

    monkeypatch.setattr(EngineCore, "complete", watched)
    result = small_run(workload, policy, small_profile(kv_tokens=4096), fast_forward=False, **settings)
    return result, tokens


def assert_gaps(result: RunResult, tokens: dict[int, list[float]]) -> int:
    """Returns the late gaps there were."""
    stream = result.workload.interactive
    assert stream is not None
    gaps_in_all = late_in_all = 0
    for row in range(len(stream.trace)):
        times = tokens[stream.first_id + row]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        late = sum(gap > stream.slo.itl_s + 1e-9 for gap in gaps)
        assert len(times) == stream.trace.output_tokens[row]
        assert result.requests.late_gaps[row] == late, row
        assert result.requests.first_token_s[row] == pytest.approx(times[0] + RPC_S, abs=1e-9)
        assert result.requests.last_token_s[row] == pytest.approx(times[-1] + RPC_S, abs=1e-9)
        gaps_in_all += len(gaps)
        late_in_all += late
    assert sum(result.itl.counts) == gaps_in_all
    assert len(result.itl.counts) == ITL_BINS
    return late_in_all


@pytest.mark.parametrize("local_autoscaler", ["fixed", "adaptive", "paper"])
def test_of_a_mixed_load(monkeypatch: pytest.MonkeyPatch, local_autoscaler: str) -> None:
    policy = plain_policy(size=1, local_autoscaler=local_autoscaler)
    workload = mixed_workload(1)
    assert workload.interactive is not None
    tight = replace(workload.interactive, slo=ClassSlo(ttft_s=10.0, itl_s=0.015))
    result, tokens = run_and_watch(monkeypatch, replace(workload, interactive=tight), policy)
    assert assert_gaps(result, tokens) > 0


def test_of_streams_interrupted_by_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    slo = ClassSlo(ttft_s=10.0, itl_s=0.03)
    workload = make_workload(trace_of(*[(0.0, 100, 100)] * 20, *[(15.0, 60, 500)] * 12), None, slo)
    result, tokens = run_and_watch(monkeypatch, workload, plain_policy(local_autoscaler="fixed"))
    assert result.preemptions > 0
    assert assert_gaps(result, tokens) > 0


@pytest.mark.parametrize("seed", range(4))
def test_of_streams_interrupted_by_losses(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    slo = ClassSlo(ttft_s=10.0, itl_s=0.03)
    rows = [(0.5 * i, 100, 60 + 10 * (i % 7)) for i in range(40)]
    workload = make_workload(trace_of(*rows), trace_of(*[(0.0, 300, 100)] * 10), slo)
    faults = FaultSettings(losses_per_hour=900.0, detection_s=0.2)
    result, tokens = run_and_watch(
        monkeypatch, workload, plain_policy(size=2), seed=seed, faults=faults, load_time_s=1.0
    )
    assert result.lost_instances > 0
    assert assert_gaps(result, tokens) > 0
