"""The one exception a handler raises to answer a call with an error status."""

from __future__ import annotations

import grpc

RETRY_PUSHBACK = "grpc-retry-pushback-ms"


class RpcFailure(Exception):
    """Ends a call with `code` and `message`, which the client sees: no paths, no addresses.

    retry_after_ms: when to try again, sent as the `grpc-retry-pushback-ms` trailing metadata.
    """

    def __init__(self, code: grpc.StatusCode, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_ms = retry_after_ms

    @property
    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        if self.retry_after_ms is None:
            return ()
        return ((RETRY_PUSHBACK, str(self.retry_after_ms)),)


def invalid_argument(message: str) -> RpcFailure:
    return RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, message)


def unavailable(message: str, retry_after_ms: int = 1000) -> RpcFailure:
    return RpcFailure(grpc.StatusCode.UNAVAILABLE, message, retry_after_ms)


def queue_full(message: str, retry_after_ms: int = 1000) -> RpcFailure:
    return RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after_ms)


def retry_after_ms(error: grpc.RpcError) -> int | None:
    """The server's retry hint in a failed call, if it gave one."""
    for key, value in error.trailing_metadata() or ():
        if key == RETRY_PUSHBACK:
            return int(value)
    return None
