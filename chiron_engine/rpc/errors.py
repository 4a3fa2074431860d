"""The one exception a handler raises to answer a call with an error status."""

from __future__ import annotations

import grpc
import grpc.aio

RETRY_PUSHBACK = "grpc-retry-pushback-ms"
ERROR_CODE = "chiron-error-code"


class RpcFailure(Exception):
    """Ends a call with `code` and `message`, which the client sees: no paths, no addresses.

    Two hints go into the trailing metadata: when to try again (`grpc-retry-pushback-ms`), and
    which case of the status this is (`chiron-error-code`, as `context_length_exceeded`).
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        error_code: str | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.error_code = error_code
        self.retry_after_ms = retry_after_ms

    @property
    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        pairs = ((RETRY_PUSHBACK, self.retry_after_ms), (ERROR_CODE, self.error_code))
        return tuple((key, str(value)) for key, value in pairs if value is not None)


def invalid_argument(message: str, error_code: str = "invalid_value") -> RpcFailure:
    return RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, message, error_code=error_code)


def unavailable(message: str, error_code: str, retry_after_ms: int = 1000) -> RpcFailure:
    return RpcFailure(
        grpc.StatusCode.UNAVAILABLE, message, error_code=error_code, retry_after_ms=retry_after_ms
    )


def exhausted(message: str, error_code: str, retry_after_ms: int | None = 1000) -> RpcFailure:
    return RpcFailure(
        grpc.StatusCode.RESOURCE_EXHAUSTED, message, error_code=error_code, retry_after_ms=retry_after_ms
    )


def internal(message: str) -> RpcFailure:
    return RpcFailure(grpc.StatusCode.INTERNAL, message, error_code="server_error")


def retry_after_ms(error: grpc.aio.AioRpcError) -> int | None:
    """The server's retry hint in a failed call, if it gave one."""
    value = _trailing(error, RETRY_PUSHBACK)
    return None if value is None else int(value)


def error_code(error: grpc.aio.AioRpcError) -> str | None:
    """Which case of its status a failed call is, if the server said so."""
    return _trailing(error, ERROR_CODE)


def _trailing(error: grpc.aio.AioRpcError, wanted: str) -> str | None:
    for key, value in error.trailing_metadata() or ():
        if key == wanted:
            return str(value)
    return None
