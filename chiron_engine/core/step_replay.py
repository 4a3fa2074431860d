"""Feeds a recorded run to a fresh engine core, on a clock and an executor that repeat what they told
then, and compares each plan with the recorded digest."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chiron_engine.core.core_settings import CoreSettings
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.null_executor import PlannedStep
from chiron_engine.core.plan_digest import PlanDigests
from chiron_engine.core.requests import InvalidRequest, QueueFull
from chiron_engine.core.step_record import FORMAT, RECORDING, ids_of
from chiron_engine.core.step_stats import StepStats
from chiron_engine.policy.iteration.autoscaler_inputs import ItlTargets
from chiron_engine.policy.iteration.drafts import WITHOUT_DRAFTS
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.plan import StepOutput, StepPlan, StepResult
from chiron_engine.policy.iteration.request import Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import SamplingParams

Fields = Mapping[str, Any]
NOT_DECIDED = ("op", "now")


@dataclass(frozen=True, slots=True)
class Difference:
    """where: the step before or in which the engine decides otherwise than it did."""

    where: str
    expected: list[str]
    got: list[str]


class RepeatedClock:
    """Tells the times it is given, in order, then the last of them."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()
        self._now = 0.0

    def load(self, times: Sequence[float]) -> None:
        self._times = deque(times)

    def now(self) -> float:
        if self._times:
            self._now = self._times.popleft()
        return self._now

    def sleep(self, seconds: float) -> None:
        """Time passes as it did."""

    def sleep_until(self, when: float) -> None:
        """Time passes as it did."""


class RepeatedResults:
    """An executor that keeps the last plan, and yields the result it is given."""

    def __init__(self, shape: ExecutorShape) -> None:
        self.shape = shape
        self.plan: StepPlan | None = None
        self.result = StepResult(None)

    def submit(self, plan: StepPlan) -> PlannedStep:
        self.plan = plan
        return PlannedStep(plan)

    def collect(self, handle: PlannedStep) -> StepResult:
        return self.result

    def close(self) -> None:
        """Nothing to release."""


class StepReplay:
    """One engine: `feed` its lines in order. Holds the requests that have not ended."""

    recording = RECORDING

    def __init__(self, header: Fields) -> None:
        """Raises ValueError for a header that this version cannot replay."""
        if header.get("format") != FORMAT:
            raise ValueError(
                f"the format of these {RECORDING} is {header.get('format')!r}; this version reads {FORMAT}"
            )
        try:
            settings = CoreSettings.from_plain(header["settings"])
            self.title = f"engine {header['engine']}, started {header['started']}"
        except (KeyError, TypeError) as error:
            raise ValueError(f"the header is not one of {RECORDING}: {error!r}") from error
        self._clock = RepeatedClock()
        self._executor = RepeatedResults(settings.shape)
        self._core = settings.build(self._executor, self._clock)
        self._core.add_step_hook(self._limits_of_hooks)
        self._hook_limits: Limits | None = None
        self._digests = PlanDigests()
        self._requests: dict[int, Request] = {}
        self._counts: Counter[str] = Counter()
        self._times: list[float] = []
        self._ops: dict[str, Callable[[Fields], Fields]] = {
            "add": self._add,
            "resume": self._resume,
            "forget": self._forget,
            "give_back": self._give_back,
            "abort": self._abort,
            "limits": self._limits,
            "targets": self._targets,
            "hand_back_evicted": self._hand_back_evicted,
            "plan": self._plan,
            "idle": self._plan,
            "result": self._result,
            "leave": self._leave,
        }

    def feed(self, line: Fields) -> Difference | None:
        """Do what the engine did. Raises ValueError for a line that is none of these."""
        name = line.get("op")
        do = self._ops.get(name) if isinstance(name, str) else None
        if do is None:
            raise ValueError(f"{name!r} is nothing that an engine does")
        self._clock.load(line.get("now", ()))
        step = self._core.scheduler.step
        try:
            got = do(line)
        except KeyError as error:
            raise ValueError(f"{name}: {error.args[0]!r} is missing, or names no request here") from error
        except Exception as error:
            return Difference(_where(line, step), [_told(line)], [f"raised {type(error).__name__}: {error}"])
        recorded = _without(line, *NOT_DECIDED)
        if got == recorded:
            self._count(line)
            return None
        differing = [key for key in {**recorded, **got} if got.get(key) != recorded.get(key)]
        return Difference(
            _where(line, step),
            [f"{key} {recorded.get(key)}" for key in differing],
            [f"{key} {got.get(key)}" for key in differing],
        )

    def summary(self) -> dict[str, Any]:
        counts = self._counts
        return {
            "steps": counts["plan"],
            "requests": counts["add"],
            "tokens": counts["tokens"],
            "preemptions": self._core.scheduler.num_preemptions,
            "span_s": self._times[-1] - self._times[0] if self._times else 0.0,
            "calls_by_kind": {name: counts[name] for name in self._ops if counts[name]},
        }

    def _count(self, line: Fields) -> None:
        self._counts[line["op"]] += 1
        self._counts["tokens"] += len(line.get("tokens") or ())
        if now := line.get("now"):
            self._times = [self._times[0] if self._times else now[0], now[-1]]

    def _limits_of_hooks(self, stats: StepStats) -> Limits | None:
        return self._hook_limits

    # What an engine does. Each takes what was recorded, and returns what is decided now.

    def _add(self, line: Fields) -> Fields:
        slo_class, ttft_s, itl_s, deadline = line["slo"]
        request = Request(
            request_id=line["id"],
            prompt_ids=line["prompt"],
            sampling=replace(
                SamplingParams() if line.get("drafts", True) else WITHOUT_DRAFTS,
                prompt_logprobs=line.get("prompt_logprobs"),
            ),
            max_tokens=line["max_tokens"],
            stop_ids=frozenset(line["stop"]),
            slo=Slo(SloClass(slo_class), float(ttft_s), float(itl_s), deadline),
            arrival=line["arrival"],
            cache_salt=bytes.fromhex(line["salt"]),
            num_preempted=line["preempted"],
            num_prior_outputs=line.get("prior", 0),
        )
        return self._queue(request, line)

    def _resume(self, line: Fields) -> Fields:
        return self._queue(self._requests[line["id"]], line)

    def _queue(self, request: Request, line: Fields) -> Fields:
        given = _without(line, *NOT_DECIDED, "refused")
        try:
            self._core.add(request)
        except (QueueFull, InvalidRequest) as error:
            return {**given, "refused": type(error).__name__}
        self._requests[request.request_id] = request
        return given

    def _forget(self, line: Fields) -> Fields:
        self._core.forget(self._requests.pop(line["id"]))
        return {"id": line["id"]}

    def _give_back(self, line: Fields) -> Fields:
        leaving = self._core.give_back_batch()
        self._drop(leaving)
        return {"ids": ids_of(leaving)}

    def _abort(self, line: Fields) -> Fields:
        return {"id": line["id"], "here": self._core.abort(line["id"])}

    def _limits(self, line: Fields) -> Fields:
        self._core.set_limits(*line["limits"])
        return {"limits": line["limits"]}

    def _targets(self, line: Fields) -> Fields:
        self._core.set_targets(ItlTargets(*line["targets"]))
        return {"targets": line["targets"]}

    def _hand_back_evicted(self, line: Fields) -> Fields:
        self._core.hand_back_evicted = line["wanted"]
        return {"wanted": line["wanted"]}

    def _plan(self, line: Fields) -> Fields:
        """`idle` has nothing but its name."""
        if not self._core.submit():
            return {}
        assert self._executor.plan is not None  # it was just given one
        return self._digests.of(self._executor.plan, self._core.scheduler.limits)

    def _result(self, line: Fields) -> Fields:
        """What a step brought is given, who ends by it is not."""
        given = _without(line, *NOT_DECIDED, "step", "finished", "handed_back")
        self._executor.result = StepResult(
            line["tokens"],
            line["device_s"],
            line.get("graph", False),
            [self._requests[request_id] for request_id in line.get("stopped", ())],
        )
        limits = line.get("hook_limits")
        self._hook_limits = None if limits is None else Limits(*limits)
        output = self._core.complete()
        return {**given, "step": output.step, **self._ends(output)}

    def _leave(self, line: Fields) -> Fields:
        return self._ends(self._core.complete())

    def _ends(self, output: StepOutput) -> Fields:
        self._drop(output.finished)
        return {"finished": ids_of(output.finished), "handed_back": ids_of(output.handed_back)}

    def _drop(self, ended: Sequence[Request]) -> None:
        for request in ended:
            self._requests.pop(request.request_id, None)


def _without(line: Fields, *names: str) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in names}


def _where(line: Fields, step: int) -> str:
    if line["op"] == "result":
        return f"what step {line.get('step')} brought"
    return (
        f"the plan of step {step}" if line["op"] in ("plan", "idle") else f"{line['op']} before step {step}"
    )


def _told(line: Fields) -> str:
    return ", ".join(f"{key} {value}" for key, value in _without(line, *NOT_DECIDED).items())
