"""Passes every call of some services on to another server, byte for byte.

Nothing is parsed, so that methods and fields this process does not know pass too. Every method is a
stream of messages both ways: on the wire a unary call is a stream of one. Of the two ends of a call
each learns what it would learn of the other directly, but for gRPC's own headers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import grpc
import grpc.aio

from .errors import RpcFailure, error_code, unavailable
from .options import MAX_MESSAGE_BYTES, channel_options

Metadata = tuple[tuple[str, Any], ...]

OWN_HEADERS = ("user-agent", "content-type", "te")
OWN_PREFIXES = (":", "grpc-")
# By default a channel that found nobody waits longer and longer, up to two minutes, to try again.
MOST_BACKOFF_MS = 1000


class PassThrough(grpc.GenericRpcHandler):
    """Add to a server of `create_server`. Its one channel is made at the first call."""

    def __init__(
        self,
        address: str,
        services: Sequence[str],
        *,
        excluded: Sequence[str] = (),
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """services: full names, as `chiron.v1.Batch`. excluded: methods of theirs that do not pass, as
        `/chiron.v1.Coordinator/Join`. max_message_bytes: what the server it is added to lets through."""
        self._address = address
        self._services = frozenset(services)
        self._excluded = frozenset(excluded)
        self._max_message_bytes = max_message_bytes
        self._channel: grpc.aio.Channel | None = None

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        service = method.removeprefix("/").partition("/")[0]
        if service not in self._services or method in self._excluded:
            return None

        async def call(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
            await _pass_on(self._open().stream_stream(method), requests, context)

        return grpc.stream_stream_rpc_method_handler(call)

    async def close(self) -> None:
        """Call it when the server has stopped: calls still under way get no status."""
        if self._channel is not None:
            await self._channel.close()

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:
            options = channel_options(self._max_message_bytes)
            options.append(("grpc.max_reconnect_backoff_ms", MOST_BACKOFF_MS))
            self._channel = grpc.aio.insecure_channel(self._address, options=options)
        return self._channel


class _Answered(RpcFailure):
    """The status of the other server, with all of its trailing metadata."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        super().__init__(error.code(), error.details() or "")
        self._trailing = tuple(error.trailing_metadata() or ())

    @property
    def trailing_metadata(self) -> Metadata:
        return self._trailing


async def _pass_on(
    method: grpc.aio.StreamStreamMultiCallable,
    requests: AsyncIterator[bytes],
    context: grpc.aio.ServicerContext,
) -> None:
    """However it ends, neither the call nor its sender outlives it: gRPC then frees what `requests` reads."""
    metadata = _passing(context.invocation_metadata() or ())
    call = method(metadata=metadata, timeout=context.time_remaining())
    sender = asyncio.create_task(_send(requests, call))
    try:
        await _answer(call, context)
    except grpc.aio.AioRpcError as error:
        raise _failure(error) from None
    finally:
        call.cancel()
        sender.cancel()
        await asyncio.wait([sender])


async def _send(requests: AsyncIterator[bytes], call: grpc.aio.StreamStreamCall) -> None:
    """Reads a request when the one before is on its way, so that the client waits for the other server.

    Not by `call.write`: where the other server ends a call early, that replaces the status it sent by
    INTERNAL (grpc/grpc#36066). Here a write that fails only ends the sending, and the status is kept.
    """
    with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.InternalError):
        await call.wait_for_connection()
        async for request in requests:
            await call._cython_call.send_serialized_message(request)
        await call.done_writing()


async def _answer(call: grpc.aio.StreamStreamCall, context: grpc.aio.ServicerContext) -> None:
    """Headers that say nothing wait for the first message: clients retry only calls refused without any.
    They never go with it as one operation (see `send_headers`)."""
    headers = tuple(await call.initial_metadata())
    are_sent = bool(headers)
    if are_sent:
        await context.send_initial_metadata(headers)
    async for response in call:
        if not are_sent:
            await context.send_initial_metadata(())
            are_sent = True
        await context.write(response)
    context.set_trailing_metadata(tuple(await call.trailing_metadata()))


def _failure(error: grpc.aio.AioRpcError) -> RpcFailure:
    """Every UNAVAILABLE of the coordinator has an error code; one without is gRPC's, about the connection."""
    if error.code() is grpc.StatusCode.UNAVAILABLE and error_code(error) is None:
        return unavailable("the coordinator cannot be reached; try again shortly", "coordinator_away")
    return _Answered(error)


def _passing(metadata: Iterable[tuple[str, Any]]) -> Metadata:
    """Without the headers that gRPC makes for each connection itself."""
    return tuple(
        (key, value) for key, value in metadata if key not in OWN_HEADERS and not key.startswith(OWN_PREFIXES)
    )
