"""An engine's line to its coordinator: reports up, orders down, joining again when it breaks."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from chiron_engine.rpc.options import channel_options
from chiron_engine.rpc.v1 import coordinator_pb2, coordinator_pb2_grpc

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.2
LONGEST_RETRY_S = 1.0
ORPHAN_S = 120.0
"""Without a coordinator for so long, an engine ends."""
LAST_REPORT_S = 1.0
"""For a coordinator to take the last report, which tells it that the engine is going."""
REFUSALS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)


@dataclass(frozen=True, slots=True)
class Orders:
    """What the coordinator may ask; all called on the link's thread. joined: it has taken the engine
    in, for the first time or again. refused(reason): it does not take this engine. orphaned(reason):
    none has answered for long."""

    joined: Callable[[], None]
    set_targets: Callable[[coordinator_pb2.SetTargets], None]
    drain: Callable[[], None]
    refused: Callable[[str], None]
    orphaned: Callable[[str], None]


class CoordinatorLink:
    """Runs in threads of its own, so that a busy event loop never looks like a dead engine."""

    def __init__(
        self,
        address: str,
        register: coordinator_pb2.Register,
        snapshot: Callable[[], coordinator_pb2.Telemetry],
        orders: Orders,
        orphan_s: float = ORPHAN_S,
    ) -> None:
        self._address = address
        self._register = register
        self._snapshot = snapshot
        self._orders = orders
        self._orphan_s = orphan_s
        self._closed = threading.Event()
        self._last_contact = time.monotonic()
        self._line: _Line | None = None
        self._thread = threading.Thread(target=self._run, name="coordinator-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Send one last report and hang up. Waits for that, or the process could end before."""
        self._closed.set()
        if self._line is not None:
            self._line.wake()
        if self._thread.is_alive():
            self._thread.join(LAST_REPORT_S)

    def _run(self) -> None:
        retry_s = FIRST_RETRY_S
        while not self._closed.is_set():
            if self._join_once():
                retry_s = FIRST_RETRY_S
            if time.monotonic() - self._last_contact > self._orphan_s:
                reason = f"no coordinator answers at {self._address}, for {self._orphan_s:g} s"
                log.error("%s; the engine ends", reason)
                self._orders.orphaned(reason)
                return
            self._closed.wait(retry_s * random.uniform(0.8, 1.2))
            retry_s = min(2 * retry_s, LONGEST_RETRY_S)

    def _join_once(self) -> bool:
        """One connection, to its end. Returns whether the coordinator answered."""
        answered = False
        options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self._address, options=options) as channel:
            line = self._line = _Line(self._closed)
            try:
                for order in coordinator_pb2_grpc.CoordinatorStub(channel).Join(self._reports(line)):
                    answered = True
                    self._last_contact = time.monotonic()
                    self._obey(order, line)
            except grpc.RpcError as error:
                self._note_failure(error, answered)
            finally:
                line.hang_up()
        return answered

    def _reports(self, line: _Line) -> Iterator[coordinator_pb2.EngineReport]:
        """Consumed by gRPC on a thread of its own."""
        yield coordinator_pb2.EngineReport(register=self._register)
        while line.wait():
            self._last_contact = time.monotonic()  # gRPC takes no more once the line is broken
            yield coordinator_pb2.EngineReport(telemetry=self._snapshot())
        if self._closed.is_set():
            yield coordinator_pb2.EngineReport(telemetry=self._snapshot())

    def _obey(self, order: coordinator_pb2.EngineOrder, line: _Line) -> None:
        kind = order.WhichOneof("order")
        if kind == "joined":
            self._register.instance_id = order.joined.instance_id
            # One that was launched is announced by who launched it.
            level = logging.DEBUG if self._register.HasField("instance_id") else logging.INFO
            log.log(level, "joined %s as engine %d", self._address, order.joined.instance_id)
            self._register.coordinator_id = order.joined.coordinator_id
            self._orders.joined()
            line.begin(order.joined.report_every_s)
        elif kind == "set_targets":
            self._orders.set_targets(order.set_targets)
        elif kind == "drain":
            self._orders.drain()

    def _note_failure(self, error: grpc.RpcError, answered: bool) -> None:
        if self._closed.is_set():
            return
        if isinstance(error, grpc.Call) and error.code() in REFUSALS:
            self._closed.set()
            self._orders.refused(error.details() or error.code().name)
            return
        level = logging.WARNING if answered else logging.DEBUG
        cause = error.details() if isinstance(error, grpc.Call) else error
        log.log(level, "coordinator %s: %s", self._address, cause)


class _Line:
    """One connection: when to report over it."""

    def __init__(self, closed: threading.Event) -> None:
        self._closed = closed
        self._condition = threading.Condition()
        self._every_s = 0.0
        self._is_over = False

    def begin(self, every_s: float) -> None:
        """The coordinator took the engine in."""
        with self._condition:
            self._every_s = every_s
            self._condition.notify()

    def hang_up(self) -> None:
        with self._condition:
            self._is_over = True
            self._condition.notify()

    def wake(self) -> None:
        """`closed` has been set."""
        with self._condition:
            self._condition.notify()

    def wait(self) -> bool:
        """Until the next report is due; False once there is to be none."""
        with self._condition:
            self._condition.wait_for(lambda: self._is_last() or self._every_s > 0.0)
            self._condition.wait_for(self._is_last, timeout=self._every_s)
            return not self._is_last()

    def _is_last(self) -> bool:
        return self._is_over or self._closed.is_set()
