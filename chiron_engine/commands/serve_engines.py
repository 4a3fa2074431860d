"""What `chiron serve` runs: starts the engines, puts a gateway before them, stops all in order."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from typing import Any

from chiron_engine.cluster.engine_report import LoadPhase
from chiron_engine.cluster.local_launcher import (
    EngineLaunchError,
    LocalLauncher,
    RunningEngine,
    threads_per_engine,
)
from chiron_engine.config import EngineConfig, GatewayConfig
from chiron_engine.gateway.engine_pool import EnginePool
from chiron_engine.gateway.server import serve_gateway
from chiron_engine.rpc.shutdown import Shutdown

from .console import LoadPhases, note
from .example_request import example_request
from .exits import CommandError, ExitCode, load_errors, port_errors, stop_code
from .model_text import model_text
from .server_options import reachable

log = logging.getLogger(__name__)

STOP_GRACE_S = 10.0


class Service:
    """One gateway and `engines` equal engine processes. `run` returns the exit code."""

    def __init__(
        self,
        listen: GatewayConfig,
        command: Sequence[str],
        engines: int,
        config: EngineConfig,
        gpus: Sequence[str] = (),
    ) -> None:
        self._listen = listen
        self._config = config
        self._phases = [LoadPhases(f"engine {index}", live=engines == 1) for index in range(engines)]
        self._launcher = LocalLauncher(
            command,
            threads=config.threads or threads_per_engine(engines),
            gpus=gpus,
            on_phase=self._show_phase,
            on_log=self._show_log,
        )
        self._live = engines

    async def run(self) -> int:
        """Until a signal, or until no engine is left. Raises CommandError where it cannot start."""
        shutdown = Shutdown(self._listen.drain_timeout_s)
        shutdown.install()
        try:
            engines = await self._launch_all(shutdown)
            if engines is not None:
                await self._serve(engines, shutdown)
        finally:
            shutdown.finished()
            await self._launcher.stop(0.0 if shutdown.now.is_set() else STOP_GRACE_S)
        if self._live == 0:
            raise CommandError("no engine is left")
        return stop_code(shutdown.signal)

    async def _launch_all(self, shutdown: Shutdown) -> list[RunningEngine] | None:
        """All engines, ready; None if asked to stop meanwhile. The first failure ends the others."""
        launches = [asyncio.create_task(self._launch(index)) for index in range(self._live)]
        everything = asyncio.gather(*launches)
        stopping = asyncio.create_task(shutdown.drain.wait())
        either: list[asyncio.Future[Any]] = [everything, stopping]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if everything.done():
            return list(await everything)
        everything.cancel()
        await asyncio.gather(everything, return_exceptions=True)
        return None

    async def _launch(self, index: int) -> RunningEngine:
        try:
            engine = await self._launcher.launch(index)
        except EngineLaunchError as error:
            code = ExitCode(error.code) if error.code in set(ExitCode) else ExitCode.RUNTIME
            raise CommandError(f"engine {index}: {error}", code) from error
        self._phases[index].done()
        log.info("engine %d is ready at %s, process %d", index, engine.ready.address, engine.ready.pid)
        return engine

    async def _serve(self, engines: list[RunningEngine], shutdown: Shutdown) -> None:
        with load_errors():
            text = model_text(engines[0].ready.model_path or None)

        def announce(port: int) -> None:
            address = reachable(self._listen.host, port)
            note(f"serving {self._config.model} on {address}; try:")
            print(example_request(address, text), flush=True)

        watchers = [asyncio.create_task(self._watch(engine, shutdown)) for engine in engines]
        try:
            with port_errors():
                await serve_gateway(
                    self._listen,
                    text,
                    self._config.served_model_name or self._config.model,
                    EnginePool([engine.ready.address for engine in engines]),
                    seed=self._config.seed,
                    shutdown=shutdown,
                    on_ready=announce,
                )
        finally:
            for watcher in watchers:
                watcher.cancel()

    async def _watch(self, engine: RunningEngine, shutdown: Shutdown) -> None:
        """Report an engine that ends by itself; the gateway sends its requests elsewhere."""
        code = await asyncio.shield(engine.exited)
        self._live -= 1
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        log.error("engine %d ended (%s); %d left", engine.index, cause, self._live)
        if self._live == 0:
            shutdown.request()

    def _show_phase(self, index: int, phase: LoadPhase) -> None:
        self._phases[index](phase.phase, phase.fraction)

    def _show_log(self, index: int, line: str) -> None:
        note(f"[engine {index}] {line}")
