"""How a command ends when a call to a server fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import grpc.aio

from .exits import CommandError, usage_error


def is_unreachable(error: grpc.aio.AioRpcError) -> bool:
    """Whether nobody answered."""
    return (
        error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in (error.details() or "").lower()
    )


def remote_failure(address: str, error: grpc.aio.AioRpcError) -> CommandError:
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return usage_error(details)
    if is_unreachable(error):
        return CommandError(f"no server answers at {address}; is `chiron serve` running?")
    return CommandError(f"the server at {address} answers {code.name}: {details}")


@contextmanager
def remote_errors(address: str) -> Iterator[None]:
    """A failed call in here ends the command."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise remote_failure(address, error) from None
