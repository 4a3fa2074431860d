"""The thread that runs an EngineCore: requests in from any thread, step outputs out to subscribers.

Nothing here knows of gRPC: the engine process and the offline asynchronous `LLM` both use it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from chiron_engine.core.engine_core import EngineCore, EngineLoad
from chiron_engine.core.requests import InvalidRequest, QueueFull
from chiron_engine.policy.iteration.autoscaler_inputs import ItlTargets
from chiron_engine.policy.iteration.limits import Shrink
from chiron_engine.policy.iteration.plan import StepOutput
from chiron_engine.policy.iteration.request import FinishReason, Request, RequestState

log = logging.getLogger(__name__)

# Wait after a step that had work but could do none of it; a submit or abort ends the wait early.
BLOCKED_WAIT_S = 0.002


class LoopState(Enum):
    RUNNING = "running"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


class EngineUnavailable(RuntimeError):
    """The loop takes no requests: it drains, has failed or is stopped (`state`)."""

    def __init__(self, state: LoopState) -> None:
        super().__init__(f"the engine takes no requests: it is {state.value}")
        self.state = state


@dataclass(slots=True, eq=False)
class Rejection:
    """A submitted request that the core did not take, and why."""

    request: Request
    error: QueueFull | InvalidRequest | EngineUnavailable


@dataclass(slots=True, eq=False)
class LoopOutput:
    """What one turn of the loop brought. A request is named in `step.finished`, `step.handed_back` or
    `rejected` exactly once, and never afterwards, unless it was handed back and submitted again."""

    step: StepOutput
    load: EngineLoad
    rejected: list[Rejection] = field(default_factory=list)


Subscriber = Callable[[LoopOutput], None]


class EngineLoop:
    """Runs `core` in its own thread and sleeps while there is no work.

    All methods may be called from any thread. Subscribers are called on the loop's thread, once a
    step at most, in the order of the steps; what they do there delays the next step.

    When a step raises, every request finishes with ERROR and the loop is FAILED for good: what the
    device holds is not known any more.
    """

    def __init__(self, core: EngineCore, *, name: str = "engine-loop") -> None:
        self.shape = core.shape
        self.clock = core.clock
        self._core = core
        self._condition = threading.Condition()
        # Guarded by the condition's lock.
        self._inbox: list[Callable[[], None]] = []
        self._state = LoopState.RUNNING
        self._stopping = False
        # Touched by the loop's thread only, but for reads of `load`, an immutable object.
        self._load = core.load()
        self._live: dict[int, Request] = {}
        self._rejected: list[Rejection] = []
        self._given_back: list[Request] = []
        self._blocked = False
        self._subscribers: tuple[Subscriber, ...] = ()
        self.drained: Future[None] = Future()  # set once it drains and has no request, or has ended
        self.ended: Future[LoopState] = Future()  # FAILED or STOPPED
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def state(self) -> LoopState:
        return self._state

    @property
    def load(self) -> EngineLoad:
        """Counters as of the last turn."""
        return self._load

    def start(self) -> None:
        self._thread.start()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call `subscriber` with every output from now on. Returns a function that ends it."""
        with self._condition:
            self._subscribers = (*self._subscribers, subscriber)
        return partial(self._unsubscribe, subscriber)

    def submit(self, request: Request) -> None:
        """Hand over a request. A full queue shows later, as a Rejection.

        Raises EngineUnavailable at once when the loop takes no more.
        """
        with self._condition:
            if self._state is not LoopState.RUNNING:
                raise EngineUnavailable(self._state)
            self._inbox.append(partial(self._admit, request))
            self._condition.notify()

    def abort(self, request_ids: Iterable[int]) -> None:
        """End these requests before the next step. Unknown and finished ones are passed over."""
        self._post(partial(self._abort, tuple(request_ids)))

    def set_limits(self, max_running: int, token_budget: int, shrink: Shrink = "drain") -> Future[None]:
        """Change the limits before the next step. The future raises ValueError for bad ones."""
        done: Future[None] = Future()
        if not self._post(partial(self._set_limits, done, max_running, token_budget, shrink)):
            done.set_exception(EngineUnavailable(self._state))
        return done

    def set_targets(self, targets: ItlTargets) -> None:
        """Inter-token latencies for the local autoscaler to keep, from the next step on."""
        self._post(partial(self._core.set_targets, targets))

    def forget(self, request: Request) -> None:
        """Drop what is saved of a request that was handed back."""
        self._post(partial(self._forget, request))

    def give_back_batch(self) -> None:
        """Hand back every batch request, with nothing saved of it."""
        self._post(partial(self._give_back_batch))

    def drain(self) -> None:
        """Take no more requests; those here run to their end, then `drained` is set."""
        with self._condition:
            if self._state is LoopState.RUNNING:
                self._state = LoopState.DRAINING
            self._condition.notify()

    def stop(self) -> None:
        """End the loop after the step under way; requests still here finish with ABORT. Does not
        wait: `ended` is set when all is done."""
        with self._condition:
            first, self._stopping = not self._stopping, True
            self._condition.notify()
        if first and self._thread.ident is None:  # never started
            self._finish(LoopState.STOPPED, FinishReason.ABORT)

    def _unsubscribe(self, subscriber: Subscriber) -> None:
        with self._condition:
            self._subscribers = tuple(s for s in self._subscribers if s is not subscriber)

    def _post(self, command: Callable[[], None]) -> bool:
        with self._condition:
            if self._state in (LoopState.FAILED, LoopState.STOPPED):
                return False
            self._inbox.append(command)
            self._condition.notify()
            return True

    def _run(self) -> None:
        try:
            while (commands := self._next_turn()) is not None:
                for command in commands:
                    command()
                self._turn()
        except Exception:
            log.exception("the engine loop failed; every request in it ends with an error")
            self._finish(LoopState.FAILED, FinishReason.ERROR)
        else:
            self._finish(LoopState.STOPPED, FinishReason.ABORT)

    def _next_turn(self) -> list[Callable[[], None]] | None:
        """Wait for something to do and return the inbox; None when the loop is to end.

        The check and the wait hold the lock that every post takes, so no wake-up is lost.
        """
        with self._condition:
            while not self._stopping and not self._inbox:
                if self._blocked:
                    self._condition.wait(BLOCKED_WAIT_S)
                    break
                if self._core.has_work:
                    break
                if self._state is LoopState.DRAINING and not self.drained.done():
                    self.drained.set_result(None)
                self._condition.wait()
            if self._stopping:
                return None
            commands, self._inbox = self._inbox, []
            return commands

    def _turn(self) -> None:
        output = self._core.step() if self._core.has_work else StepOutput(self._load.step)
        if self._given_back:
            output.handed_back = [*output.handed_back, *self._given_back]
            self._given_back = []
        for request in (*output.finished, *output.handed_back):
            self._live.pop(request.request_id, None)
        steps_before, self._load = self._load.step, self._core.load()
        moved = self._load.step != steps_before or bool(
            output.requests or output.finished or output.handed_back
        )
        self._blocked = self._core.has_work and not moved
        rejected, self._rejected = self._rejected, []
        if output.requests or output.finished or output.handed_back or rejected:
            self._deliver(LoopOutput(output, self._load, rejected))

    def _deliver(self, output: LoopOutput) -> None:
        for subscriber in self._subscribers:
            try:
                subscriber(output)
            except Exception:
                log.exception("a subscriber of the engine loop failed and is dropped")
                self._unsubscribe(subscriber)

    def _admit(self, request: Request) -> None:
        try:
            self._core.add(request)
        except (QueueFull, InvalidRequest) as error:
            self._rejected.append(Rejection(request, error))
        else:
            self._live[request.request_id] = request

    def _abort(self, request_ids: tuple[int, ...]) -> None:
        for request_id in request_ids:
            self._core.abort(request_id)

    def _forget(self, request: Request) -> None:
        if request.state is RequestState.EVICTED:  # it may have come back meanwhile
            self._core.forget(request)

    def _give_back_batch(self) -> None:
        self._given_back += self._core.give_back_batch()

    def _set_limits(self, done: Future[None], max_running: int, token_budget: int, shrink: Shrink) -> None:
        if not done.set_running_or_notify_cancel():  # whoever asked has given up
            return
        try:
            self._core.set_limits(max_running, token_budget, shrink)
        except ValueError as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def _finish(self, state: LoopState, reason: FinishReason) -> None:
        """Flip the state, answer what is left, release the device. The loop's last act."""
        with self._condition:
            self._state = state
            commands, self._inbox = self._inbox, []
        for command in commands:
            self._refuse(command)
        left, self._live = list(self._live.values()), {}
        for request in left:
            request.finish_reason = reason
        rejected, self._rejected = self._rejected, []
        if left or rejected:
            self._deliver(LoopOutput(StepOutput(self._load.step, finished=left), self._load, rejected))
        try:
            self._core.close()
        except Exception:
            log.exception("the executor did not close cleanly")
        if not self.drained.done():
            self.drained.set_result(None)
        self.ended.set_result(state)

    def _refuse(self, command: Callable[[], None]) -> None:
        """Answer a command that came too late to be carried out."""
        assert isinstance(command, partial)
        if command.func == self._admit:
            self._rejected.append(Rejection(command.args[0], EngineUnavailable(self._state)))
        elif command.func == self._set_limits and command.args[0].set_running_or_notify_cancel():
            command.args[0].set_exception(EngineUnavailable(self._state))
