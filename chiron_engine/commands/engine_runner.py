"""Runs one engine in this process, from a configuration to its exit code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from chiron_engine.config import EngineConfig, GatewayConfig
from chiron_engine.rpc.shutdown import Shutdown
from chiron_engine.serving.core_setup import LoadedModel, Progress
from chiron_engine.serving.engine_process import (
    Companion,
    EngineFailed,
    LoadedEngine,
    ReportPhase,
    run_engine,
)
from chiron_engine.serving.engine_service import EngineDescription
from chiron_engine.serving.fleet_member import EngineRefused, Join

from .exits import CommandError, load_errors, port_errors, stop_code
from .steady_heap import freeze_heap, loading_heap


class EngineRunner:
    """progress(phase, fraction): called while the model loads; the engine's status shows the phase too."""

    def __init__(
        self, config: EngineConfig, listen: GatewayConfig, progress: Progress, join: Join | None = None
    ) -> None:
        """join: the fleet to join once the model is loaded."""
        self._join = join
        self._config = config
        self._listen = listen
        self._progress = progress
        self._resources = ExitStack()

    async def run(
        self,
        on_ready: Callable[[int, LoadedModel], None],
        companion: Callable[[str], Companion] | None = None,
        on_joined: Callable[[], None] = lambda: None,
    ) -> int:
        """Until a signal stops it. on_ready(port, model): called once. on_joined: whenever a coordinator
        has taken it in; on the main thread. Raises CommandError."""
        shutdown = Shutdown(self._listen.drain_timeout_s)
        shutdown.install()
        with self._resources, port_errors():
            try:
                await run_engine(
                    self._load,
                    host=self._listen.host,
                    port=self._listen.grpc_port,
                    seed=self._config.seed,
                    reflection=self._listen.reflection,
                    max_message_bytes=self._listen.max_message_bytes,
                    shutdown=shutdown,
                    companion=companion,
                    join=self._join,
                    on_ready=lambda port: self._begin(port, on_ready),
                    on_joined=on_joined,
                )
            except (EngineFailed, EngineRefused) as error:
                raise CommandError(str(error)) from error
        return stop_code(shutdown.signal)

    def _begin(self, port: int, on_ready: Callable[[int, LoadedModel], None]) -> None:
        freeze_heap()
        on_ready(port, self._loaded)

    def _load(self, report_phase: ReportPhase) -> LoadedEngine:
        """Called in a thread of its own."""
        report = partial(self._report, report_phase)
        # Frozen here, and not only in `_begin`, which holds up the thread that hears of the fleet.
        with load_errors(), loading_heap():
            self._loaded = loaded = self._load_model(report)
        description = EngineDescription(loaded.name, loaded.architecture, loaded.dtype, loaded.eos_token_ids)
        return LoadedEngine(loaded.core, description, loaded.costs, loaded.compile_guide)

    def _load_model(self, report: Progress) -> LoadedModel:
        if self._config.executor == "simulated":
            from .simulated_engine import load_simulated

            return load_simulated(self._config, self._resources)
        from chiron_engine.model.source import resolve_model
        from chiron_engine.serving.core_setup import load_core

        resolve_model(self._config.model, report)  # says what is wrong before torch is imported
        return load_core(self._config, self._resources, report, time_steps=self._join is not None)

    def _report(self, report_phase: ReportPhase, phase: str, fraction: float) -> None:
        report_phase(phase)
        self._progress(phase, fraction)
