"""What `chiron batch` does at a server."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import TextIO

import grpc
import grpc.aio

from chiron_engine.rpc.client import BatchClient
from chiron_engine.rpc.v1 import batch_pb2

from .batch_file import result_fields
from .console import note
from .exits import CommandError, ExitCode
from .remote_errors import is_unreachable, remote_errors

CALL_TIMEOUT_S = 60.0
SUBMIT_TIMEOUT_S = 600.0
POLL_S = (0.05, 1.0)
"""Between two looks at a batch: the first time, and after a while."""
LOST_FOR_S = 60.0
"""How long a server may be away while one waits for a batch: it may be coming back."""


class RemoteBatches:
    """The batches of one server. Calls raise CommandError."""

    def __init__(self, client: BatchClient) -> None:
        self._client = client

    async def submit(
        self, spec: batch_pb2.BatchSpec, lines: Sequence[batch_pb2.BatchLine]
    ) -> batch_pb2.BatchInfo:
        try:
            with remote_errors(self._client.address):
                return await self._client.submit(spec, lines, timeout=SUBMIT_TIMEOUT_S)
        except CommandError as error:
            if error.code is ExitCode.RUNTIME:
                note(f"to try again, and be sure that it is stored once, add --id {spec.batch_id}")
            raise

    async def get(self, batch_id: str) -> batch_pb2.BatchInfo:
        with remote_errors(self._client.address):
            return await self._client.get(batch_id, timeout=CALL_TIMEOUT_S)

    async def cancel(self, batch_id: str) -> batch_pb2.BatchInfo:
        with remote_errors(self._client.address):
            return await self._client.cancel(batch_id, timeout=CALL_TIMEOUT_S)

    async def list(self, limit: int) -> list[batch_pb2.BatchInfo]:
        """The newest ones, at most `limit`."""
        found: list[batch_pb2.BatchInfo] = []
        with remote_errors(self._client.address):
            while len(found) < limit:
                after = found[-1].batch_id if found else ""
                page = await self._client.list(min(limit - len(found), 100), after, timeout=CALL_TIMEOUT_S)
                found += page.batches
                if not page.has_more:
                    break
        return found

    async def wait(self, batch_id: str) -> batch_pb2.BatchInfo:
        """Return once its last line has ended. A server that goes away meanwhile may come back."""
        progress = LineProgress()
        pause_s, lost_s = POLL_S[0], 0.0
        while True:
            try:
                batch = await self._client.get(batch_id, timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or lost_s > LOST_FOR_S:
                    progress.done()
                    with remote_errors(self._client.address):
                        raise
                if not lost_s and is_unreachable(error):
                    note(f"the server at {self._client.address} is away; waiting for it to come back")
                lost_s += pause_s
            else:
                lost_s = 0.0
                progress.show(batch.lines)
                if batch.HasField("finished_at"):
                    progress.done()
                    return batch
            await asyncio.sleep(pause_s)
            pause_s = min(POLL_S[1], 1.2 * pause_s)

    async def fetch(self, batch_id: str, output: Path | None) -> int:
        """Write the results there are, in the order of the lines, one JSON object each. Returns how many
        have no output. A file is there only once it is whole."""
        if output is None:
            return await self._write_results(batch_id, sys.stdout)
        part = output.with_name(output.name + ".part")
        try:
            with part.open("w", encoding="utf-8") as file:
                without = await self._write_results(batch_id, file)
            os.replace(part, output)
        except OSError as error:
            raise CommandError(f"cannot write {output}: {error.strerror}") from error
        finally:
            part.unlink(missing_ok=True)
        return without

    async def _write_results(self, batch_id: str, file: TextIO) -> int:
        without = 0
        with remote_errors(self._client.address):
            async for result in self._client.results(batch_id, timeout=CALL_TIMEOUT_S):
                without += not result.HasField("output")
                file.write(json.dumps(result_fields(result), ensure_ascii=False) + "\n")
        file.flush()
        return without


@asynccontextmanager
async def remote_batches(address: str) -> AsyncIterator[RemoteBatches]:
    async with BatchClient(address) as client:
        yield RemoteBatches(client)


class LineProgress:
    """Lines that have ended, on standard error, on a terminal only."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_shown = False

    def show(self, lines: batch_pb2.LineCounts) -> None:
        if not self._stream.isatty():
            return
        self._is_shown = True
        self._stream.write(f"\r{num_ended(lines)} of {lines.total} lines, {lines.running} running\x1b[K")
        self._stream.flush()

    def done(self) -> None:
        if self._is_shown:
            self._stream.write("\n")
            self._is_shown = False


def num_ended(lines: batch_pb2.LineCounts) -> int:
    return lines.total - lines.queued - lines.running - lines.evicted


def batch_fields(batch: batch_pb2.BatchInfo) -> dict[str, object]:
    """As --json prints it. Times are Unix seconds, null where there is none."""
    times = {
        name: getattr(batch, name) if batch.HasField(name) else None
        for name in ("deadline", "expires_at", "cancelled_at", "finished_at")
    }
    return {
        "batch_id": batch.batch_id,
        "name": batch.name,
        "metadata": dict(batch.metadata),
        "status": status_of(batch),
        "lines": {name: getattr(batch.lines, name) for name in batch.lines.DESCRIPTOR.fields_by_name},
        "created": batch.created,
        **times,
    }


def status_of(batch: batch_pb2.BatchInfo) -> str:
    return batch_pb2.BatchStatus.Name(batch.status).removeprefix("BATCH_STATUS_").lower()


def described(batch: batch_pb2.BatchInfo) -> str:
    """Several lines for people."""
    lines = batch.lines
    states = ("queued", "running", "evicted", "done", "failed", "expired", "cancelled")
    counts = ", ".join(f"{getattr(lines, state)} {state}" for state in states if getattr(lines, state))
    rows = [("batch", batch.batch_id), ("name", batch.name), ("status", status_of(batch))]
    rows += [("lines", f"{lines.total}: {counts}"), ("created", _time(batch.created))]
    for name in ("deadline", "expires_at", "cancelled_at", "finished_at"):
        if batch.HasField(name):
            rows.append((name.removesuffix("_at"), _time(getattr(batch, name))))
    rows += [(f"metadata {key}", value) for key, value in sorted(batch.metadata.items())]
    return "\n".join(f"{label:10} {value}" for label, value in rows if value)


def table(batches: Sequence[batch_pb2.BatchInfo]) -> str:
    rows = [("BATCH", "STATUS", "ENDED", "CREATED", "NAME")]
    for batch in batches:
        ended = f"{num_ended(batch.lines)}/{batch.lines.total}"
        rows.append((batch.batch_id, status_of(batch), ended, _time(batch.created), batch.name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
