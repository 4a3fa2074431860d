"""Records one engine's run: what came to it, when, what each step brought, and a digest of each plan.

`step_replay` feeds a record to a fresh engine, which then makes the same plans. A record holds the
tokens of every prompt and output, as what blocks can be shared depends on them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from chiron_engine import __version__
from chiron_engine.core.clocks import Clock, MonotonicClock
from chiron_engine.core.core_settings import CoreSettings
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import Executor, StepHandle
from chiron_engine.core.plan_digest import PlanDigests
from chiron_engine.core.requests import InvalidRequest, QueueFull
from chiron_engine.core.step_stats import StepHook
from chiron_engine.policy.iteration.autoscaler_inputs import ItlTargets
from chiron_engine.policy.iteration.drafts import may_draft
from chiron_engine.policy.iteration.limits import Limits, Shrink
from chiron_engine.policy.iteration.plan import StepOutput, StepPlan, StepResult
from chiron_engine.policy.iteration.request import Request, RequestState

log = logging.getLogger(__name__)

RECORDING = "engine steps"
FORMAT = 1
FLUSH_S = 0.25

_to_json = json.JSONEncoder(separators=(",", ":")).encode


class StepRecord:
    """A file of JSON lines: a header, then one line for each call of the core. A killed process loses
    at most the lines of its last quarter of a second; a write that fails ends the record, not the engine."""

    def __init__(self, folder: Path) -> None:
        """A new file in `folder`, made where it is missing, which only its owner can read: it holds
        prompts. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._file = _new_file(folder)
        self._flushed = time.monotonic()

    def begin(self, settings: CoreSettings) -> None:
        self.write(
            {
                "recording": RECORDING,
                "format": FORMAT,
                "version": __version__,
                "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
                "engine": self.path.stem,
                "settings": asdict(settings),
            }
        )
        self.flush()

    def write(self, line: dict[str, Any]) -> None:
        if self._file.closed:
            return
        now = time.monotonic()
        try:
            self._file.write(_to_json(line).encode() + b"\n")
            if now - self._flushed >= FLUSH_S:
                self.flush()
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        if self._file.closed:
            return
        try:
            self._file.flush()
        except OSError as error:
            self._give_up(error)
        self._flushed = time.monotonic()

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.error("nothing more is written to %s: %s", self.path, error.strerror)
        try:
            self._file.close()  # tries once more to write what is left, and closes all the same
        except OSError:
            log.debug("the end of %s is lost", self.path)


def _new_file(folder: Path) -> tuple[Path, BinaryIO]:
    began = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    name = f"steps-{socket.gethostname()}-{os.getpid()}-{began}"
    number = 1
    while True:
        path = folder / f"{name}-{number}.jsonl"
        try:
            return path, open(path, "xb", opener=lambda file, flags: os.open(file, flags, 0o600))
        except FileExistsError:
            number += 1


class ClockTape:
    """A clock that keeps the times it told."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._told: list[float] = []

    def now(self) -> float:
        now = self._clock.now()
        self._told.append(now)
        return now

    def take(self) -> list[float]:
        told, self._told = self._told, []
        return told

    def sleep(self, seconds: float) -> None:
        self._clock.sleep(seconds)

    def sleep_until(self, when: float) -> None:
        self._clock.sleep_until(when)


class WatchedExecutor:
    """Keeps the last plan and the last result of the executor inside of it."""

    def __init__(self, executor: Executor) -> None:
        self.shape = executor.shape
        self.plan: StepPlan | None = None
        self.result = StepResult(None)
        self._executor = executor

    def submit(self, plan: StepPlan) -> StepHandle:
        handle = self._executor.submit(plan)
        self.plan = plan
        return handle

    def collect(self, handle: StepHandle) -> StepResult:
        self.result = self._executor.collect(handle)
        return self.result

    def close(self) -> None:
        self._executor.close()


class RecordedCore(EngineCore):
    """An engine core that writes down what is asked of it, and what it does. Everything a plan depends
    on comes through here: the calls, the times the core reads, the results of steps, and limits
    that step hooks set. Steps cannot be passed over (`fast_forward`)."""

    def __init__(
        self, settings: CoreSettings, executor: Executor, record: StepRecord, clock: Clock | None = None
    ) -> None:
        """Raises what `CoreSettings.build` raises."""
        self._record = record
        self._tape = ClockTape(clock or MonotonicClock())
        self._watched = WatchedExecutor(executor)
        self._digests = PlanDigests()
        self._hook_limits: list[Limits] = []
        self._is_idle = False
        super().__init__(self._watched, clock=clock, **settings.arguments())
        self._clock = self._tape  # `clock` itself is for other threads
        record.begin(settings)

    def add(self, request: Request) -> None:
        line = described(request)
        try:
            super().add(request)
        except (QueueFull, InvalidRequest) as error:
            line["refused"] = type(error).__name__
            raise
        finally:
            self._write(line)

    def forget(self, request: Request) -> None:
        super().forget(request)
        self._write({"op": "forget", "id": request.request_id})

    def give_back_batch(self) -> list[Request]:
        leaving = super().give_back_batch()
        self._write({"op": "give_back", "ids": ids_of(leaving)})
        return leaving

    def abort(self, request_id: int) -> bool:
        was_here = super().abort(request_id)
        self._write({"op": "abort", "id": request_id, "here": was_here})
        return was_here

    def set_limits(self, max_running: int, token_budget: int, shrink: Shrink = "drain") -> None:
        super().set_limits(max_running, token_budget, shrink)
        self._write({"op": "limits", "limits": [max_running, token_budget, shrink]})

    def set_targets(self, targets: ItlTargets) -> None:
        super().set_targets(targets)
        self._write({"op": "targets", "targets": [targets.interactive_s, targets.batch_s]})

    @property
    def hand_back_evicted(self) -> bool:
        return self.scheduler.hand_back_evicted

    @hand_back_evicted.setter
    def hand_back_evicted(self, wanted: bool) -> None:
        self.scheduler.hand_back_evicted = wanted
        self._write({"op": "hand_back_evicted", "wanted": wanted})

    def add_step_hook(self, hook: StepHook) -> Callable[[], None]:
        return super().add_step_hook(lambda stats: self._noted(hook(stats)))

    def submit(self) -> bool:
        if super().submit():
            assert self._watched.plan is not None  # it was just given one
            digest = self._digests.of(self._watched.plan, self.scheduler.limits)
            self._write({"op": "plan", **digest})
            return True
        if self._is_idle:  # a repeated look at an engine that cannot go on
            self._tape.take()
        else:
            self._write({"op": "idle"})
            self._is_idle = True
        return False

    def complete(self) -> StepOutput:
        steps = len(self._in_flight)
        output = super().complete()
        ends = {"finished": ids_of(output.finished), "handed_back": ids_of(output.handed_back)}
        if steps:
            self._write({"op": "result", "step": output.step, **self._result(), **ends})
        elif output.finished or output.handed_back:
            self._write({"op": "leave", **ends})
        if not self.has_work:
            self._record.flush()
        return output

    def close(self) -> None:
        super().close()
        self._record.close()

    def _set(self, limits: Limits | None) -> None:
        """The autoscaler's choice follows from the rest."""
        if limits is not None:
            super().set_limits(limits.max_running, limits.token_budget, limits.shrink)

    def _noted(self, limits: Limits | None) -> Limits | None:
        """Limits that a hook sets; those above the capacity are refused."""
        shape = self.shape
        if (
            limits is not None
            and limits.max_running <= shape.max_slots
            and limits.token_budget <= shape.max_step_tokens
        ):
            self._hook_limits.append(limits)
        return limits

    def _result(self) -> dict[str, Any]:
        result = self._watched.result
        fields: dict[str, Any] = {"device_s": result.device_s, "tokens": result.tokens}
        if result.graph:
            fields["graph"] = True
        if result.stopped:
            fields["stopped"] = ids_of(result.stopped)
        if self._hook_limits:
            limits = self._hook_limits[-1]
            fields["hook_limits"] = [limits.max_running, limits.token_budget, limits.shrink]
            self._hook_limits = []
        return fields

    def _write(self, line: dict[str, Any]) -> None:
        self._is_idle = False
        if told := self._tape.take():
            line["now"] = told
        self._record.write(line)


def described(request: Request) -> dict[str, Any]:
    """A request that is about to be added, as a line; one that was handed back is known by its id."""
    if request.state is RequestState.EVICTED:
        return {"op": "resume", "id": request.request_id}
    if request.block_keys or isinstance(request.prompt_ids, range):
        raise ValueError(f"request {request.request_id} stands for unknown tokens; those cannot be recorded")
    slo = request.slo
    line: dict[str, Any] = {
        "op": "add",
        "id": request.request_id,
        "prompt": list(request.prompt_ids),
        "max_tokens": request.max_tokens,
        "stop": sorted(request.stop_ids),
        "slo": [int(slo.slo_class), _number(slo.ttft_s), _number(slo.itl_s), slo.deadline],
        "arrival": request.arrival,
        "salt": request.cache_salt.hex(),
        "preempted": request.num_preempted,
        # It takes no prefix from the cache, and its prompt is computed in smaller chunks.
        **({} if (asked := request.sampling.prompt_logprobs) is None else {"prompt_logprobs": asked}),
    }
    if request.num_prior_outputs:
        line["prior"] = request.num_prior_outputs  # not of the prompt that is scored
    if not may_draft(request):
        line["drafts"] = False
    return line


def ids_of(requests: Iterable[Request]) -> list[int]:
    return [request.request_id for request in requests]


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else str(value)
