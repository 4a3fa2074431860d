"""What the measures of both loops read off a run."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from collections.abc import AsyncIterator, Sequence

import pytest

from chiron_engine.policy.iteration.plan import Joined, StepPlan
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY
from chiron_engine.rpc.v1 import coordinator_pb2
from scripts.loop_measures.eviction import Record
from scripts.loop_measures.local import Run, best_of, neighbours
from scripts.loop_measures.measured import Measured, Options
from scripts.loop_measures.open_load import Answer, Ask, Wrong, arrivals, compare, send
from scripts.loop_measures.processes import CpuClock, memory
from scripts.loop_measures.simulator import Counts, Watch, distance
from scripts.measure_loops import main


def run(name: str, inside: float, tokens_per_s: float) -> Run:
    return Run(name, inside, 100, tokens_per_s, 20, 32)


def test_the_best_pair_is_the_fastest_of_those_that_keep_the_slo() -> None:
    fixed = [run("slow", 1.0, 90.0), run("good", 0.995, 100.0), run("late", 0.9, 150.0)]
    assert best_of(fixed, run("adaptive", 0.999, 99.0)).name == "good"


def test_where_adaptive_keeps_less_a_pair_may_keep_as_little() -> None:
    fixed = [run("good", 0.995, 100.0), run("late", 0.9, 150.0)]
    assert best_of(fixed, run("adaptive", 0.9, 99.0)).name == "late"


def test_where_no_pair_keeps_it_the_one_that_keeps_most_counts() -> None:
    fixed = [run("late", 0.8, 150.0), run("less late", 0.9, 100.0)]
    assert best_of(fixed, run("adaptive", 0.99, 99.0)).name == "less late"


def test_pairs_to_try_fit_the_engine() -> None:
    for running, budget in neighbours(Run("adaptive", 1.0, 1, 1.0, 60, 480)):
        assert 1 <= running <= 64 and budget >= 1 and running + budget <= 512


def answer(tokens: list[int], error: str = "") -> Answer:
    return Answer(Ask(1, 3), 0.0, 0.0, 0.1, tokens, error)


def test_answers_that_are_not_the_right_one_are_told_apart() -> None:
    right = {1: [7, 8, 9]}
    answers = [
        answer([7, 8, 9]),
        answer([7, 8]),
        answer([7, 8, 9], "gone"),
        answer([7, 8, 8, 9]),
        answer([7, 9, 9]),
    ]
    assert compare(answers, right) == Wrong(lost=2, doubled=1, other=1)


def test_requests_are_sent_at_their_times_whatever_comes_back() -> None:
    class Slow:
        async def stream(self, ask: Ask) -> AsyncIterator[Sequence[int]]:
            await asyncio.sleep(0.3)
            for token in range(ask.tokens):
                yield [token]

    answers = asyncio.run(send(Slow(), [0.0, 0.05, 0.1], 2))
    assert [a.tokens for a in answers] == [[0, 1]] * 3
    assert all(a.ttft_s >= 0.3 for a in answers)
    assert answers[2].sent < answers[0].first  # nobody waited for an answer


def test_arrivals_come_at_the_rate_asked_for() -> None:
    times = arrivals(100.0, 50.0, 1)
    assert times == sorted(times) and times[-1] < 50.0
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert arrivals(100.0, 50.0, 1) == times


def test_counts_are_compared_with_what_was_there_around_that_time() -> None:
    simulated = Counts([0.0, 10.0], [1, 4])
    real = Counts([0.0, 11.0], [1, 4])
    assert distance(real, simulated, 10.5, 0.0) == 3
    assert distance(real, simulated, 10.5, 2.0) == 0
    assert distance(real, simulated, 20.0, 2.0) == 0
    assert distance(Counts([0.0], [2]), simulated, 20.0, 2.0) == 2


def test_a_launch_lasts_from_when_it_is_seen_until_it_is_ready() -> None:
    def fleet(**states: str) -> coordinator_pb2.Fleet:
        instances = [
            coordinator_pb2.Instance(instance_id=int(name[1:]), state=state) for name, state in states.items()
        ]
        return coordinator_pb2.Fleet(instances=instances)

    watch = Watch()
    assert watch.load_s is None
    watch.look(fleet(i0="ready"), 0.0)
    watch.look(fleet(i0="ready", i1="loading"), 1.0)
    watch.look(fleet(i0="ready", i1="ready"), 2.5)
    assert watch.load_s == 1.5
    assert watch.counts.counts == [1, 2, 2]


def test_what_a_resumed_request_has_to_compute_again_is_counted() -> None:
    request = Request(1, list(range(40)), GREEDY, 10)
    record = Record()
    record.plan(StepPlan(0, preempted=[request]))
    record.plan(StepPlan(1, joined=[Joined(0, request, None, 32, [])]))
    (resume,) = record.resumes
    assert (resume.kept, resume.found, resume.recomputed) == (39, 32, 7)


def test_cpu_and_memory_of_a_process() -> None:
    clock = CpuClock(os.getpid())
    while clock.seconds < 0.05:
        sum(range(10_000))
    assert clock.share > 0
    size = memory(os.getpid())
    assert 0 < size.private <= size.resident
    assert CpuClock(2**22 + 1).seconds == 0.0  # above any pid


def test_a_missed_target_is_said() -> None:
    measured = Measured(notes=["a note"])
    measured.judge("quick", "slow", False)
    measured.stop_watch()
    out = io.StringIO()
    measured.print("relay", Options(), out)
    assert "MISSED  quick; seen: slow" in out.getvalue()
    assert "load average" in out.getvalue()
    (target,) = measured.as_json("relay", Options())["targets"]
    assert target == {"target": "quick", "seen": "slow", "met": False}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["relay", "--scale", "0"], "--scale is 0.0; it must be over 0"),
        (["relay", "--seed", "-1"], "--seed is -1; it must not be negative"),
        (["relay", "--model", "smollm2"], "--model and --dtype are for local and eviction; relay has none"),
        (["relay", "--json", "/nowhere/a.json"], "--json: the folder of '/nowhere/a.json' does not exist"),
    ],
)
def test_what_cannot_be_measured_is_said(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_loops.py", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
