"""What is refused before a simulation starts, and what is only remarked on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

import pytest

from chiron_engine.sim.feasibility import batch_1_step_s, check_feasible, prefill_s
from chiron_engine.sim.profile import Profile
from chiron_engine.sim.profiles import load_profile
from chiron_engine.sim.traces.trace import Trace
from chiron_engine.sim.workload import BATCH_SLO, INTERACTIVE_SLO, ClassSlo, Workload, make_workload


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile("h100/llama-3.1-70b/tp2/bf16")


def trace(*sizes: tuple[int, int]) -> Trace:
    prompts, outputs = zip(*sizes, strict=True)
    return Trace("t", array("d", range(len(sizes))), array("i", prompts), array("i", outputs))


def interactive(sizes: Sequence[tuple[int, int]], ttft_s: float = 10.0, itl_s: float = 0.2) -> Workload:
    return make_workload(trace(*sizes), None, ClassSlo(ttft_s, itl_s), BATCH_SLO)


def test_a_workload_that_fits_has_no_remarks(profile: Profile) -> None:
    work = make_workload(trace((1, 1), (4000, 500)), trace((3000, 100)), INTERACTIVE_SLO, BATCH_SLO)
    assert check_feasible(work, profile, max_gpus=2) == []


def test_a_fleet_without_room_for_one_instance_is_refused(profile: Profile) -> None:
    with pytest.raises(ValueError, match=r"max_gpus is 1, but one instance of .* takes 2 GPUs"):
        check_feasible(interactive([(1, 1)]), profile, max_gpus=1)


def test_requests_larger_than_an_instance_are_counted(profile: Profile) -> None:
    room = min(profile.kv_capacity_tokens, profile.max_model_len)
    room -= room % 64  # whole blocks of KV
    sizes = [(10, 10), (room, 1), (room - 1, 1), (5, room)]
    with pytest.raises(ValueError, match=rf"2 of 4 requests of t do not fit .* row 2, has {room} prompt"):
        check_feasible(interactive(sizes), profile, max_gpus=2)


def test_an_itl_slo_below_the_best_step_is_refused_with_the_best_on_offer(profile: Profile) -> None:
    best_ms = 1e3 * profile.step_times.seconds(1, 100, 0, 0)
    with pytest.raises(ValueError, match=rf"ITL SLO of 2 ms .* best on offer is {best_ms:.4g} ms"):
        check_feasible(interactive([(100, 9), (200, 9)], itl_s=0.002), profile, max_gpus=2)


def test_a_single_token_has_no_gap_to_meet(profile: Profile) -> None:
    assert check_feasible(interactive([(100, 1)], itl_s=0.002), profile, max_gpus=2) == []


def test_a_ttft_slo_below_the_shortest_prefill_is_refused(profile: Profile) -> None:
    with pytest.raises(ValueError, match=r"TTFT SLO of 0.001 s"):
        check_feasible(interactive([(100, 9)], ttft_s=0.001), profile, max_gpus=2)


def test_some_late_requests_are_a_remark_with_the_largest_that_meets_it(profile: Profile) -> None:
    slo_s = prefill_s(profile, 2000)
    (remark,) = check_feasible(interactive([(100, 9), (9000, 9)], ttft_s=slo_s), profile, max_gpus=2)
    assert "1 of 2 requests of t cannot meet the TTFT SLO" in remark
    most = int(remark.split("at most ")[1].split()[0])
    assert prefill_s(profile, most) <= slo_s < prefill_s(profile, most + 1)
    assert 2000 <= most < 9000


def test_a_deadline_shorter_than_the_work_is_refused(profile: Profile) -> None:
    def batch(deadline: float) -> Workload:
        return make_workload(None, trace((100, 1000), (100, 10)), batch_slo=ClassSlo(1.0, 1.0, deadline))

    with pytest.raises(ValueError, match=r"within its deadline of 0.1 s; the best on offer is"):
        check_feasible(batch(0.1), profile, max_gpus=2)
    (remark,) = check_feasible(batch(3.0), profile, max_gpus=2)
    assert "1 of 2 requests of t" in remark
    assert check_feasible(batch(100.0), profile, max_gpus=2) == []


def test_a_long_prompt_is_computed_in_chunks(profile: Profile) -> None:
    chunk = profile.max_step_tokens
    first = profile.step_times.seconds(0, 0, chunk, chunk * chunk)
    second = profile.step_times.seconds(0, 0, 10, 10 * (chunk + 10))
    assert prefill_s(profile, chunk + 10) == pytest.approx(first + second)


def test_the_step_of_one_request_alone(profile: Profile) -> None:
    assert 0.005 < batch_1_step_s(profile) < 0.1


def test_a_profile_may_hold_less_than_the_context_that_slos_count_in(profile: Profile) -> None:
    small = replace(profile, kv_capacity_tokens=512)
    assert batch_1_step_s(small) == profile.step_times.seconds(1, 512, 0, 0)
