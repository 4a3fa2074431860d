"""A server interceptor that makes every handler parse its bytes itself and fail cleanly.

grpc.aio answers bytes that do not parse with UNKNOWN and the text of the exception. Here every
handler of the server (health and reflection included) takes bytes; what does not parse is
INVALID_ARGUMENT. Of an unexpected exception the client learns only a number to quote from the log.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from .errors import RpcFailure, invalid_argument

log = logging.getLogger(__name__)

Parse = Callable[[bytes], Any]


class RawHandlers(grpc.aio.ServerInterceptor):
    """Pass as an interceptor to `grpc.aio.server`. Handlers must be `async def`."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: grpc answers UNIMPLEMENTED
            return None
        return _wrap(handler, handler_call_details.method)


def _wrap(handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
    parse = handler.request_deserializer or bytes
    serialize = handler.response_serializer
    if handler.unary_unary:
        call = _guarded(_unary(handler.unary_unary, parse), method)
        return grpc.unary_unary_rpc_method_handler(call, None, serialize)
    if handler.unary_stream:
        call = _guarded(_streaming(handler.unary_stream, parse, _parse), method)
        return grpc.unary_stream_rpc_method_handler(call, None, serialize)
    if handler.stream_unary:
        call = _guarded(_stream_unary(handler.stream_unary, parse), method)
        return grpc.stream_unary_rpc_method_handler(call, None, serialize)
    call = _guarded(_streaming(handler.stream_stream, parse, _parse_each), method)
    return grpc.stream_stream_rpc_method_handler(call, None, serialize)


def _parse(raw: bytes, parse: Parse) -> Any:
    try:
        return parse(raw)
    except (DecodeError, RecursionError):
        raise invalid_argument("the request does not parse as the protobuf message of this method") from None


async def _parse_each(raw: AsyncIterator[bytes], parse: Parse) -> AsyncIterator[Any]:
    async for item in raw:
        yield _parse(item, parse)


def _unary(function: Callable[..., Any], parse: Parse) -> Callable[..., Any]:
    async def call(raw: bytes, context: grpc.aio.ServicerContext) -> Any:
        return await function(_parse(raw, parse), context)

    return call


def _stream_unary(function: Callable[..., Any], parse: Parse) -> Callable[..., Any]:
    async def call(raw: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
        return await function(_parse_each(raw, parse), context)

    return call


def _streaming(
    function: Callable[..., Any], parse: Parse, reader: Callable[[Any, Parse], Any]
) -> Callable[..., Any]:
    generates = inspect.isasyncgenfunction(function)

    async def call(raw: Any, context: grpc.aio.ServicerContext) -> None:
        request = reader(raw, parse)
        if not generates:
            await function(request, context)
            return
        async for response in function(request, context):
            await context.write(response)

    return call


def _guarded(call: Callable[..., Any], method: str) -> Callable[..., Any]:
    async def guarded(raw: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await call(raw, context)
        except RpcFailure as failure:
            await _abort(context, method, failure)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception:
            number = uuid.uuid4().hex
            log.exception("internal error %s in %s", number, method)
            message = f"internal error; it is logged under {number}"
            await _abort(context, method, RpcFailure(grpc.StatusCode.INTERNAL, message))

    return guarded


async def send_headers(context: grpc.aio.ServicerContext) -> None:
    """Send the headers apart from the first message. A handler whose writes may block does this
    just before its first one: gRPC sends headers and first message as one operation, and until
    that is done it can send no error status either, so that the client would wait for ever."""
    await context.send_initial_metadata(())


async def _abort(context: grpc.aio.ServicerContext, method: str, failure: RpcFailure) -> None:
    try:
        await context.abort(failure.code, failure.message, failure.trailing_metadata)
    except grpc.aio.AbortError:
        raise
    except Exception:
        # The peer is gone or the server has stopped: there is nobody to tell.
        log.debug("%s: could not send the status (%s)", method, failure.message, exc_info=True)
        raise asyncio.CancelledError from None
