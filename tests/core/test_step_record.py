"""A recorded engine plans the same when its record is replayed; a policy that does not is caught."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.core_settings import CoreSettings
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.null_executor import NullExecutor, PlannedStep
from chiron_engine.core.requests import InvalidRequest, QueueFull
from chiron_engine.core.step_record import RecordedCore, StepRecord
from chiron_engine.core.step_replay import StepReplay
from chiron_engine.policy.iteration.autoscaler_inputs import ItlTargets
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.plan import StepPlan, StepResult
from chiron_engine.policy.iteration.prompt_lookup import PromptLookup
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.policy.iteration.scheduler import Scheduler
from chiron_engine.policy.iteration.step_costs import StepCosts
from tests.core.engines import make_request

SHAPE = ExecutorShape(
    block_size=4,
    num_device_blocks=24,
    num_host_blocks=16,
    max_slots=6,
    max_step_tokens=24,
    max_model_len=96,
    vocab_size=50,
)
SETTINGS = CoreSettings(
    SHAPE,
    "adaptive",
    ItlTargets(0.02, 0.1),
    StepCosts(5e-3, 1e-4, 1e-7, 2e-5),
    SwapCosts(1e-5, 1e-5, 1e-3),
    max_queued_requests=12,
)


class TickingClock(VirtualClock):
    """Every look at it takes a little time."""

    def now(self) -> float:
        self.sleep(1.7e-5)
        return super().now()


class UnevenExecutor(NullExecutor):
    """Steps that take more or less time, as real ones do; tokens from a small vocabulary, so that
    stop tokens come and prompts share blocks with outputs."""

    def __init__(self, shape: ExecutorShape, clock: VirtualClock) -> None:
        super().__init__(shape)
        self._clock = clock
        self._seed = 1

    def collect(self, handle: PlannedStep) -> StepResult:
        self._seed = (self._seed * 1103515245 + 12345) % 2**31
        seconds = 0.004 + self._seed / 2**31 * 0.02
        self._clock.sleep(seconds)
        return StepResult(super().collect(handle).tokens, seconds, self._seed % 2 == 0)


@dataclass
class Recording:
    core: RecordedCore
    path: Path
    saved: list[Request] = field(default_factory=list)
    num_requests: int = 0

    def step(self) -> None:
        if self.core.has_work:
            self.saved += self.core.step().handed_back

    def finish(self) -> list[dict[str, Any]]:
        while self.core.has_work:
            self.step()
        self.core.close()
        return read(self.path)


def recording(folder: Path, settings: CoreSettings = SETTINGS) -> Recording:
    record = StepRecord(folder)
    clock = TickingClock(1000.0)
    return Recording(
        RecordedCore(settings, UnevenExecutor(settings.shape, clock), record, clock), record.path
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plans_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line.get("op") == "plan"]


def replayed(lines: list[dict[str, Any]]) -> StepReplay:
    """Fails at a difference."""
    replay = StepReplay(lines[0])
    for number, line in enumerate(lines[1:], 2):
        assert (difference := replay.feed(line)) is None, f"line {number}: {line}, {difference}"
    return replay


def act(recording: Recording, action: str, choice: int) -> None:
    core = recording.core
    if action in ("interactive", "batch"):
        number = recording.num_requests = recording.num_requests + 1
        stop_ids = frozenset({choice % 50}) if choice % 3 == 0 else frozenset()
        prompt = [7] * (choice % 40) + [choice % 5] * (1 + choice % 9)
        request = make_request(
            number,
            prompt,
            1 + choice % 30,
            batch=action == "batch",
            arrival=core.clock.now(),
            stop_ids=stop_ids,
        )
        if choice % 5 == 0:
            request.sampling = SamplingParams(prompt_logprobs=choice % 3)
            request.num_prior_outputs = choice % len(prompt)
        with suppress(QueueFull, InvalidRequest):
            core.add(request)
    elif action == "steps":
        for _ in range(1 + choice % 12):
            recording.step()
    elif action == "abort":
        core.abort(1 + choice % max(1, recording.num_requests))
    elif action == "limits":
        most = 1 + choice % 6
        core.set_limits(most, max(most, choice % 25), "preempt" if choice % 2 else "drain")
    elif action == "targets":
        core.set_targets(ItlTargets(0.005 + choice % 7 * 0.01, 0.1))
    elif action == "hand-back":
        core.hand_back_evicted = choice % 2 == 0
    elif action == "drain":
        core.give_back_batch()
    elif action in ("resume", "forget") and recording.saved:
        request = recording.saved.pop(choice % len(recording.saved))
        if action == "forget":
            core.forget(request)
        else:
            with suppress(QueueFull):
                core.add(request)


REPEATING_VOCAB = 26
"""With so many tokens scripted outputs repeat after two."""
ACTIONS = (
    "interactive", "interactive", "batch", "batch", "batch", "steps", "steps", "steps",
    "abort", "limits", "targets", "hand-back", "drain", "resume", "resume", "forget",
)  # fmt: skip
steps = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 10_000)), max_size=60)
variants = st.builds(
    lambda autoscaler, depth, caching, host, guesses: replace(
        SETTINGS,
        local_autoscaler=autoscaler,
        enable_prefix_caching=caching,
        shape=replace(SHAPE, pipeline_depth=depth, num_host_blocks=host, vocab_size=REPEATING_VOCAB),
        num_speculative_tokens=guesses if depth == 1 else 0,
    ),
    st.sampled_from((None, "adaptive", "paper", "paper-literal", "fixed")),
    st.sampled_from((1, 2)),
    st.booleans(),
    st.sampled_from((0, 16)),
    st.sampled_from((0, 5)),
)


@settings(max_examples=120, deadline=None)
@given(steps, variants)
def test_whatever_happens_to_an_engine_replays(
    actions: list[tuple[str, int]], settings: CoreSettings
) -> None:
    with TemporaryDirectory() as folder:
        run = recording(Path(folder), settings)
        for action, choice in actions:
            act(run, action, choice)
        lines = run.finish()
    summary = replayed(lines).summary()
    assert summary["steps"] == len(plans_of(lines)) == run.core.load().step
    assert summary["preemptions"] == run.core.load().preemptions


@pytest.fixture
def busy_run(tmp_path: Path) -> list[dict[str, Any]]:
    """Evictions, resizes, stops and aborts, on a pool too small for all."""
    run = recording(tmp_path)
    run.core.hand_back_evicted = True
    for number in range(60):
        act(run, "batch" if number % 3 else "interactive", 37 * number + number * number % 11)
        act(run, "steps", number % 4)
        act(run, "resume", number)
        if number % 10 == 5:
            act(run, "abort", number - 1)
            act(run, "limits", 3 + number)
    return run.finish()


def test_a_busy_run_has_what_matters(busy_run: list[dict[str, Any]]) -> None:
    summary = replayed(busy_run).summary()
    assert summary["preemptions"] > 5 and summary["requests"] == 60 and summary["steps"] > 100
    calls = summary["calls_by_kind"]
    assert {"add", "resume", "abort", "limits", "plan", "result"} <= set(calls)
    keys = {key for line in plans_of(busy_run) for key in line}
    assert {"joined", "left", "chunks", "preempted", "final", "grown", "copies_out", "copies_in"} <= keys
    assert len({tuple(line["limits"]) for line in plans_of(busy_run)}) > 3


@pytest.fixture
def guessing_run(tmp_path: Path) -> list[dict[str, Any]]:
    shape = replace(SHAPE, vocab_size=REPEATING_VOCAB)
    settings = replace(
        SETTINGS,
        shape=shape,
        targets=ItlTargets(0.2, 0.5),
        costs=StepCosts(14e-3, 1e-4, 1e-7, 2e-5),
        num_speculative_tokens=5,
    )
    run = recording(tmp_path, settings)
    for number in range(40):
        act(run, "batch" if number % 3 else "interactive", 37 * number + number * number % 11)
        if number % 5 == 0:
            request = make_request(1000 + number, 9, 20)
            request.sampling = replace(request.sampling, frequency_penalty=0.5)
            with suppress(QueueFull):
                run.core.add(request)
        act(run, "steps", number % 4)
        if number % 10 == 5:
            act(run, "abort", number - 1)
    assert run.core.load().accepted_tokens > 20
    return run.finish()


def test_guesses_replay(guessing_run: list[dict[str, Any]]) -> None:
    replayed(guessing_run)
    drafts = [line["drafts"] for line in plans_of(guessing_run) if "drafts" in line]
    assert len(drafts) > 5 and all(len(tokens) > 1 for step in drafts for _, _, tokens in step)
    assert any(line.get("drafts") is False for line in guessing_run if line.get("op") == "add")


def test_other_guesses_are_caught(
    guessing_run: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(line["step"] for line in plans_of(guessing_run) if "drafts" in line)
    guess = PromptLookup.guess
    monkeypatch.setattr(PromptLookup, "guess", lambda self, count: [t ^ 1 for t in guess(self, count)])
    replay = StepReplay(guessing_run[0])
    difference = next(filter(None, map(replay.feed, guessing_run[1:])))
    assert difference.where == f"the plan of step {first}"
    assert difference.expected[0].startswith("drafts ")


def test_a_policy_that_plans_otherwise_is_caught_at_that_step(
    busy_run: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It evicts the one to be served first instead of the last."""
    victim = Scheduler._victim
    evicting = [line["step"] for line in plans_of(busy_run) if "preempted" in line]

    def other(self: Scheduler, allowed: Any) -> Request | None:
        chosen = victim(self, allowed)
        return next((r for r in self._active() if allowed(r) and r is not chosen), chosen)

    monkeypatch.setattr(Scheduler, "_victim", other)
    replay = StepReplay(busy_run[0])
    difference = next(filter(None, map(replay.feed, busy_run[1:])))
    step = int(difference.where.removeprefix("the plan of step "))
    assert step in evicting
    assert any(told.startswith("preempted") for told in difference.expected)
    assert len(difference.expected) == len(difference.got)
    assert difference.expected != difference.got


@pytest.mark.parametrize("wrong_step", [0, 17, 60])
def test_one_plan_that_differs_is_named(
    busy_run: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, wrong_step: int
) -> None:
    plan = Scheduler.plan

    def mutated(self: Scheduler, now: float) -> StepPlan | None:
        made = plan(self, now)
        if made is not None and made.step == wrong_step:
            made.left.append(5)
        return made

    monkeypatch.setattr(Scheduler, "plan", mutated)
    replay = StepReplay(busy_run[0])
    difference = next(filter(None, map(replay.feed, busy_run[1:])))
    assert difference.where == f"the plan of step {wrong_step}"
    assert [told.split()[0] for told in difference.got] == ["left"]


def test_other_limits_are_caught_at_the_first_plan_under_them(busy_run: list[dict[str, Any]]) -> None:
    header = json.loads(json.dumps(busy_run[0]))
    header["settings"]["targets"]["interactive_s"] = 0.2
    replay = StepReplay(header)
    difference = next(filter(None, map(replay.feed, busy_run[1:])))
    assert difference.where.startswith("the plan of step ")
    assert difference.expected[0].startswith("limits ") and difference.got[0].startswith("limits ")


def test_limits_that_a_hook_sets_are_replayed(tmp_path: Path) -> None:
    """A hook is code of its user's: what it said is recorded, not why."""
    run = recording(tmp_path, replace(SETTINGS, local_autoscaler="fixed"))
    sizes: Iterator[int] = iter(range(1, 100))
    run.core.add_step_hook(lambda stats: Limits(1 + next(sizes) % 5, 24) if stats.step % 3 == 0 else None)
    for number in range(12):
        act(run, "interactive", 31 * number)
    lines = run.finish()
    replayed(lines)
    assert len({line["limits"][0] for line in plans_of(lines)}) == 6


def test_a_record_without_hooks_is_just_a_core(tmp_path: Path) -> None:
    """The recorded core behaves as the plain one."""
    run = recording(tmp_path)
    clock = TickingClock(1000.0)
    plain = SETTINGS.build(UnevenExecutor(SHAPE, clock), clock)
    other = Recording(plain, tmp_path)  # type: ignore[arg-type]
    for number in range(40):
        for one in (run, other):
            act(one, "batch" if number % 2 else "interactive", 37 * number)
            act(one, "steps", number % 3)
    run.finish()
    while plain.has_work:
        other.step()
    assert plain.load() == run.core.load() and plain.load().preemptions


def test_an_engine_that_cannot_go_on_is_not_written_again_and_again(tmp_path: Path) -> None:
    run = recording(tmp_path)
    act(run, "batch", 10)
    run.step()
    run.core.abort(1)
    for _ in range(500):
        assert not run.core.submit()
    lines = run.finish()
    assert [line.get("op") for line in lines[1:]] == ["add", "plan", "result", "abort", "idle", "leave"]
    replayed(lines)


def test_only_its_owner_reads_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "records"
    first, second = StepRecord(folder), StepRecord(folder)
    assert first.path != second.path
    assert [path.stat().st_mode & 0o777 for path in sorted(folder.iterdir())] == [0o600, 0o600]
    first.close()
    second.close()


def test_a_full_disk_ends_the_record_not_the_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    run = recording(tmp_path)
    run.core._record._file.close()
    run.core._record._file = open("/dev/full", "wb")  # noqa: SIM115 - closed by the record
    for number in range(20):
        act(run, "interactive", 31 * number)
        run.step()
    while run.core.has_work:
        run.step()
    run.core.close()
    assert caplog.text.count("nothing more is written to") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"op": "dance"}, "'dance' is nothing that an engine does"),
        ({"op": ["plan"]}, "is nothing that an engine does"),
        ({"op": "forget", "id": 999}, "forget: 999 is missing, or names no request here"),
        ({"op": "limits"}, "limits: 'limits' is missing"),
    ],
)
def test_damaged_lines_are_told(busy_run: list[dict[str, Any]], line: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        StepReplay(busy_run[0]).feed(line)


def test_another_format_is_refused(busy_run: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="the format of these engine steps is 9; this version reads 1"):
        StepReplay({**busy_run[0], "format": 9})
    with pytest.raises(ValueError, match="the header is not one of engine steps: KeyError"):
        StepReplay({**busy_run[0], "settings": {}})
