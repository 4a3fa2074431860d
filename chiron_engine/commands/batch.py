"""`chiron batch`: work without a waiting client, stored by a running server and fetched later."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from typer import Argument, Option

from .console import note
from .durations import parse_duration
from .exits import ExitCode, usage_error

if TYPE_CHECKING:
    from chiron_engine.rpc.v1 import batch_pb2

    from .batch_remote import RemoteBatches

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, help="Batches of requests at a running server.")


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Server = Annotated[str, Option("--server", metavar="HOST:PORT", help="The server.")]
BatchId = Annotated[str, Argument(metavar="BATCH", help="Its id, as `submit` printed it.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
Output = Annotated[
    Path | None, Option("--output", "-o", dir_okay=False, help="Write the results here (standard output).")
]


@app.command()
def submit(
    file: Annotated[
        str, Argument(metavar="FILE", help='JSON lines, {"custom_id": ..., "body": {...}} each; - is stdin.')
    ],
    server: Server,
    name: Annotated[str, Option(help="A name to know it by.")] = "",
    batch_id: Annotated[
        str | None, Option("--id", help="Its id (drawn); the same again stores nothing twice.")
    ] = None,
    completion_window: Annotated[
        float | None,
        Option(parser=_duration, metavar="TIME", help="Deadline of lines without one: 24h, 30min."),
    ] = None,
    expire_after: Annotated[
        float | None,
        Option(parser=_duration, metavar="TIME", help="When to give up what is unfinished (never)."),
    ] = None,
    metadata: Annotated[list[str] | None, Option(metavar="KEY=VALUE", help="May be repeated.")] = None,
    wait: Annotated[bool, Option("--wait", help="Wait for the end and print the results.")] = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Store a batch at a server. Prints its id (with --json what `show` prints; with --wait the results).

    Exit code 0 says that it is on the server's disk; with --wait, that every line is done.
    """
    from chiron_engine.rpc.v1 import batch_pb2

    if output is not None and not wait:
        raise usage_error("--output is for the results: add --wait, or fetch them later")
    spec = batch_pb2.BatchSpec(
        batch_id=f"batch_{uuid.uuid4().hex}" if batch_id is None else batch_id,
        name=name,
        metadata=_metadata(metadata or []),
        completion_window_s=completion_window,
        expire_after_s=expire_after,
    )
    lines = _read(file)

    async def work(batches: RemoteBatches) -> int:
        batch = await batches.submit(spec, lines)
        if not wait:
            _print(batch, as_json, batch.batch_id)
            return 0
        note(f"stored {batch.batch_id}, {batch.lines.total} lines")
        await batches.wait(batch.batch_id)
        return await batches.fetch(batch.batch_id, output)

    _exit(_at(server, work))


@app.command("list")
def list_batches(
    server: Server,
    limit: Annotated[int, Option(min=1, help="Batches, at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List batches, the newest first; with --json one object a line."""
    from .batch_remote import batch_fields, table

    found = _at(server, lambda batches: batches.list(limit))
    if as_json:
        for batch in found:
            print(json.dumps(batch_fields(batch), ensure_ascii=False))
    else:
        print(table(found))


@app.command()
def show(batch_id: BatchId, server: Server, as_json: AsJson = False) -> None:
    """Show one batch: how many of its lines are in which state."""
    _print(_at(server, lambda batches: batches.get(batch_id)), as_json)


@app.command()
def cancel(batch_id: BatchId, server: Server, as_json: AsJson = False) -> None:
    """Cancel a batch. Lines that wait end at once, running ones within moments; results stay."""
    _print(_at(server, lambda batches: batches.cancel(batch_id)), as_json)


@app.command()
def fetch(
    batch_id: BatchId,
    server: Server,
    output: Output = None,
    wait: Annotated[bool, Option("--wait", help="Wait for the end of the batch first.")] = False,
) -> None:
    """Print the results there are, one JSON object a line, in the order of the lines.

    Exit code 1 says that some have no output: they failed, expired or were cancelled.
    """
    from .batch_remote import num_ended

    async def work(batches: RemoteBatches) -> int:
        batch = await (batches.wait(batch_id) if wait else batches.get(batch_id))
        if not batch.HasField("finished_at"):
            note(f"not finished: {num_ended(batch.lines)} of {batch.lines.total} lines have ended")
        return await batches.fetch(batch_id, output)

    _exit(_at(server, work))


def _at(server: str, work: Callable[[RemoteBatches], Awaitable[T]]) -> T:
    from .batch_remote import remote_batches

    async def run() -> T:
        async with remote_batches(server) as batches:
            return await work(batches)

    return asyncio.run(run())


def _exit(without_output: int) -> None:
    if without_output:
        note(f"chiron: {without_output} lines have no output; their `error` says why")
        sys.exit(ExitCode.RUNTIME)


def _print(batch: batch_pb2.BatchInfo, as_json: bool, short: str | None = None) -> None:
    from .batch_remote import batch_fields, described

    if as_json:
        print(json.dumps(batch_fields(batch), ensure_ascii=False))
    else:
        print(described(batch) if short is None else short)


def _metadata(pairs: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or key in found:
            raise usage_error(f"--metadata is {pair!r}; give each KEY=VALUE once")
        found[key] = value
    return found


def _read(file: str) -> list[batch_pb2.BatchLine]:
    from .batch_file import BatchFileError, read_lines

    try:
        if file == "-":
            return list(read_lines(sys.stdin))
        with open(file, encoding="utf-8") as lines:
            return list(read_lines(lines))
    except BatchFileError as error:
        raise usage_error(f"{file}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise usage_error(f"cannot read {file}: {error}") from error
