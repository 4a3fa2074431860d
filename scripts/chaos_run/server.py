"""`chiron serve` as a process that is killed and started again, on one port and state directory."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio

from chiron_engine.cluster.engine_records import EngineRecords
from chiron_engine.rpc.client import BatchClient, CoordinatorClient, InferenceClient
from chiron_engine.rpc.v1 import coordinator_pb2

ENGINES = 2
READY_S = 120.0
STOP_S = 60.0
LOOK_EVERY_S = 0.05
CHIRON = [sys.executable, "-m", "chiron_engine"]

Instances = list[coordinator_pb2.Instance]


class Server:
    """life: how often it was killed. is_up: between its readiness and its next kill."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        """folder: for its state, recordings and log."""
        self.port = _free_port()
        self.life = 0
        self.is_up = asyncio.Event()
        self.state = folder / "state"
        self.events = folder / "events.jsonl"
        self.steps = folder / "steps"
        self._log = folder / "server.log"
        self._command = [
            *CHIRON, "serve", *arguments, "--engines", str(ENGINES), "--max-engines", str(ENGINES),
            "--min-engines", str(ENGINES), "--grpc-port", str(self.port), "--state-dir", str(self.state),
            "--event-log", str(self.events), "--record-steps", str(self.steps),
        ]  # fmt: skip
        address = f"127.0.0.1:{self.port}"
        self.inference = InferenceClient(address)
        self.batch = BatchClient(address)
        self._coordinator = CoordinatorClient(address)
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> float:
        """Return once it serves, with the seconds that took. Raises RuntimeError where it ends instead."""
        began = time.monotonic()
        with self._log.open("ab") as log:
            process = self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        clients = (self.inference, self.batch, self._coordinator)
        serving = asyncio.gather(*(client.wait_serving(READY_S) for client in clients))
        while not serving.done():
            if process.poll() is not None:
                serving.cancel()
                raise RuntimeError(f"the server ended with code {process.returncode}; see {self._log}")
            await asyncio.sleep(LOOK_EVERY_S)
        await serving
        self.is_up.set()
        return time.monotonic() - began

    def kill(self) -> None:
        """SIGKILL of the coordinator and gateway; the engines go on."""
        assert self._process is not None
        self.is_up.clear()
        self.life += 1
        self._process.kill()
        self._process.wait()

    async def stop(self) -> int | None:
        """Its exit code after SIGTERM; None where it did not end in time."""
        assert self._process is not None
        self.is_up.clear()
        self._process.send_signal(signal.SIGTERM)
        try:
            return await asyncio.to_thread(self._process.wait, STOP_S)
        except subprocess.TimeoutExpired:
            return None

    async def close(self) -> None:
        """Leave no process behind, whatever happened."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pid in self.engines_left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for client in (self.inference, self.batch, self._coordinator):
            await client.close()

    def engines_left(self) -> list[int]:
        """Pids of the engines that live, by what is noted in the state directory."""
        return [record.pid for record in EngineRecords(self.state).survivors()]

    async def ready_engines(self) -> Instances:
        fleet = await self._coordinator.fleet()
        return [instance for instance in fleet.instances if instance.state == "ready"]

    async def wait_engines(self, accept: Callable[[Instances], bool]) -> Instances:
        """The ready engines, once they are as asked for. Raises TimeoutError, saying what there was."""
        deadline, engines = time.monotonic() + READY_S, []
        while time.monotonic() < deadline:
            with suppress(grpc.aio.AioRpcError):
                engines = await self.ready_engines()
                if accept(engines):
                    return engines
            await asyncio.sleep(LOOK_EVERY_S)
        seen = [f"{e.instance_id}: {e.telemetry.running_interactive} interactive" for e in engines]
        raise TimeoutError(f"the engines were not as awaited within {READY_S:.0f} s: {seen}; see {self._log}")

    def replay(self) -> dict[str, Any]:
        """What `chiron replay` says of all that was recorded; `code` is its exit code."""
        files = [str(path) for path in (self.events, *sorted(self.steps.iterdir()))]
        run = subprocess.run([*CHIRON, "replay", "--json", *files], capture_output=True, text=True)
        told = json.loads(run.stdout)["files"] if run.stdout else []
        return {"code": run.returncode, "files": told, "errors": run.stderr.strip()}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
