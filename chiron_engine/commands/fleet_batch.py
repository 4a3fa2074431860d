"""The batch side of `chiron serve`: the store, who runs what is in it, and the service over both."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Self

import grpc.aio

from chiron_engine.cluster.batch_errors import BatchStoreError, BatchStoreLocked
from chiron_engine.cluster.batch_runner import BatchRunner
from chiron_engine.cluster.batch_service import BatchService
from chiron_engine.cluster.batch_store_thread import BatchStoreThread
from chiron_engine.cluster.batch_upload import CheckedRequest
from chiron_engine.cluster.coordinator import Coordinator
from chiron_engine.gateway.batch_text import BatchText
from chiron_engine.gateway.server import Gateway
from chiron_engine.gateway.text import ModelText
from chiron_engine.rpc.shutdown import Shutdown
from chiron_engine.rpc.v1 import batch_pb2_grpc, inference_pb2

from .exits import CommandError, ExitCode


class FleetBatch:
    """To be opened before engines are started, and closed after the coordinator."""

    def __init__(
        self, store: BatchStoreThread, coordinator: Coordinator, gateway: Gateway, text: ModelText
    ) -> None:
        """Use `open`."""
        self._store = store
        self._gateway = gateway
        self._runner = BatchRunner(store, coordinator, BatchText(text))

    @classmethod
    async def open(cls, directory: Path, coordinator: Coordinator, gateway: Gateway, text: ModelText) -> Self:
        """Takes the directory and what was left in it. Raises CommandError: usage, naming the holder,
        where another process has it or it cannot be used at all, runtime where it is damaged."""
        store = None
        try:
            store = await BatchStoreThread.open(directory)
            batch = cls(store, coordinator, gateway, text)
            await batch._runner.start()
        except BatchStoreLocked as error:
            raise CommandError(str(error), ExitCode.USAGE) from error
        except OSError as error:
            raise CommandError(
                f"cannot use the state directory {directory}: {error.strerror}; choose another one with "
                "--state-dir",
                ExitCode.USAGE,
            ) from error
        except BatchStoreError as error:
            if store is not None:
                await store.close()
            raise CommandError(str(error)) from error
        return batch

    def add_to(self, server: grpc.aio.Server) -> None:
        service = BatchService(self._store, self._runner, self._check)
        batch_pb2_grpc.add_BatchServicer_to_server(service, server)

    async def follow(self, shutdown: Shutdown) -> None:
        """Start no more lines once the server drains."""
        await shutdown.drain.wait()
        self._runner.drain()

    async def close(self) -> None:
        await self._runner.close()
        await self._store.close()

    async def _check(self, request: inference_pb2.GenerateRequest) -> CheckedRequest:
        message = await self._gateway.resolve(request)
        return CheckedRequest(message, len(message.token_ids.ids), message.sampling.max_tokens)


@asynccontextmanager
async def batch_service(
    directory: Path,
    server: grpc.aio.Server,
    coordinator: Coordinator,
    gateway: Gateway,
    text: ModelText,
    shutdown: Shutdown,
) -> AsyncIterator[None]:
    """The Batch service on `server`, and its lines on the fleet. Raises what `FleetBatch.open` raises."""
    batch = await FleetBatch.open(directory, coordinator, gateway, text)
    batch.add_to(server)
    following = asyncio.create_task(batch.follow(shutdown))
    try:
        yield
    finally:
        following.cancel()
        await batch.close()


def state_directory(given: Path | None, model: str, port: int, asked_port: int, resources: ExitStack) -> Path:
    """Where batches are kept: as given, else in the user's state folder, by model and port. A server on
    a port of the system's choice has nothing to come back to: its batches last as long as it does, in
    a temporary directory that `resources` removes."""
    if given is not None:
        return given.expanduser()
    if asked_port == 0:
        return Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="chiron-batch-")))
    home = os.environ.get("XDG_STATE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-.") or "model"
    return base / "chiron" / f"{name}-{port}"
