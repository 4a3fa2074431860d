"""One call to the coordinator of a running fleet, and how it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

from typer import Argument, Option

from chiron_engine.config import GatewayConfig

from .exits import CommandError, usage_error

if TYPE_CHECKING:
    from chiron_engine.rpc.client import CoordinatorClient

T = TypeVar("T")

DEFAULT_SERVER = f"{GatewayConfig().host}:{GatewayConfig().grpc_port}"

Server = Annotated[str, Option("--server", metavar="HOST:PORT", help="The server of the fleet.")]
InstanceId = Annotated[
    int, Argument(metavar="ID", min=0, max=2**63 - 1, help="Of the engine, as `ps` shows.")
]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]


def call(address: str, ask: Callable[[CoordinatorClient], Awaitable[T]]) -> T:
    """What the coordinator at `address` answers. Raises CommandError."""

    async def run() -> T:
        from chiron_engine.rpc.client import CoordinatorClient

        async with CoordinatorClient(address) as client:
            return await answer(address, ask(client))

    return asyncio.run(run())


async def answer(address: str, asked: Awaitable[T]) -> T:
    """Raises CommandError where the call fails; a usage error where the server says so."""
    import grpc
    import grpc.aio

    try:
        return await asked
    except grpc.aio.AioRpcError as error:
        code, details = error.code(), error.details() or "no details"
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            raise usage_error(details) from None
        if code is grpc.StatusCode.NOT_FOUND:
            raise CommandError(details) from None
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise CommandError(f"no server answers at {address}; is `chiron serve` running?") from None
        if code is grpc.StatusCode.UNIMPLEMENTED:
            raise CommandError(f"the server at {address} has no fleet; `chiron serve` does") from None
        raise CommandError(f"the server at {address} answers {code.name}: {details}") from None
