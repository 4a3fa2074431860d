"""Receiving a batch: from the messages of a Submit call to what the store takes."""

from __future__ import annotations

import asyncio
import hashlib
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import grpc

from chiron_engine.rpc.errors import RpcFailure, exhausted, invalid_argument
from chiron_engine.rpc.v1 import batch_pb2, inference_pb2, types_pb2
from chiron_engine.rpc.wire import MAX_TARGET_S, slo_fields

from .batch_checks import BatchLimits, shown
from .batch_errors import BatchTooLarge
from .batch_records import NewBatch, NewLine

# Lines handled between two turns of the event loop.
LINES_PER_TURN = 64
# A client that sends nothing for this long has its upload dropped.
UPLOAD_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that an engine can take. message: what is stored, which may differ from what came
    (token ids for text, a seed where none was given)."""

    message: inference_pb2.GenerateRequest
    prompt_tokens: int
    max_tokens: int


# Raises RpcFailure for what no engine here can run.
CheckRequest = Callable[[inference_pb2.GenerateRequest], Awaitable[CheckedRequest]]


class UploadSpace:
    """Bounds the bytes of unfinished uploads, which are in memory."""

    def __init__(self, max_bytes: int) -> None:
        self._free = max_bytes

    def take(self, size: int) -> None:
        if size > self._free:
            raise exhausted("too many batches are being submitted at once; try again", "rate_limit_exceeded")
        self._free -= size

    def give_back(self, size: int) -> None:
        self._free += size


class Upload:
    """One Submit call. Checks each line as it comes, so that a wrong batch ends early."""

    def __init__(self, check: CheckRequest, limits: BatchLimits, space: UploadSpace, now: float) -> None:
        """now: wall time of receipt, from which the windows count."""
        self._check = check
        self._limits = limits
        self._space = space
        self._now = now
        self._size = 0
        self._spec: batch_pb2.BatchSpec | None = None
        self._is_complete = False
        self.lines: list[NewLine] = []

    async def receive(self, messages: AsyncIterator[batch_pb2.SubmitBatchRequest]) -> NewBatch:
        """Read to the end; the batch, with its lines in `lines`. Raises RpcFailure, BatchTooLarge."""
        while True:
            try:
                async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                    message = await anext(messages, None)
            except TimeoutError:
                raise RpcFailure(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"no message of the batch came for {UPLOAD_TIMEOUT_S:.0f} s; nothing was stored",
                    error_code="deadline_exceeded",
                ) from None
            if message is None:
                break
            self._take_space(message.ByteSize())
            self._take_spec(message)
            self._is_complete = message.complete
            await self._take_lines(message)
        if self._spec is None:
            raise invalid_argument("the call has no messages; the first must hold the batch")
        if not self._is_complete:
            raise invalid_argument("complete is not set in the last message: nothing was stored")
        return self._batch(self._spec)

    def release(self) -> None:
        """The upload is stored or dropped."""
        self._space.give_back(self._size)
        self._size = 0

    def _take_space(self, size: int) -> None:
        self._space.take(size)
        self._size += size

    def _take_spec(self, message: batch_pb2.SubmitBatchRequest) -> None:
        if self._spec is None:
            if not message.HasField("batch"):
                raise invalid_argument("batch is not set in the first message of the call")
            self._spec = message.batch
        elif message.HasField("batch"):
            raise invalid_argument("batch is set in a later message; it belongs in the first one only")

    async def _take_lines(self, message: batch_pb2.SubmitBatchRequest) -> None:
        max_lines, max_bytes = self._limits.max_lines, self._limits.max_batch_bytes
        if len(self.lines) + len(message.lines) > max_lines:
            raise BatchTooLarge(f"the batch has more than {max_lines} lines, which is the limit")
        if self._size > 2 * max_bytes:  # ids and framing may double short requests
            raise BatchTooLarge(f"the batch takes more than {max_bytes} bytes, which is the limit")
        for line in message.lines:
            self.lines.append(await self._line(line))
            if len(self.lines) % LINES_PER_TURN == 0:
                await asyncio.sleep(0)

    async def _line(self, line: batch_pb2.BatchLine) -> NewLine:
        try:
            return await self._checked_line(line)
        except RpcFailure as failure:
            where = f"line {len(self.lines)} ({shown(line.custom_id)})"
            raise RpcFailure(
                failure.code,
                f"{where}: {failure.message}",
                error_code=failure.error_code,
                retry_after_ms=failure.retry_after_ms,
            ) from None

    async def _checked_line(self, line: batch_pb2.BatchLine) -> NewLine:
        if not line.HasField("request"):
            raise invalid_argument("request is not set")
        request = line.request
        if request.request_id:
            raise invalid_argument("request_id is set; leave it empty, custom_id names the line")
        if request.slo.slo_class == types_pb2.SLO_CLASS_INTERACTIVE:
            raise invalid_argument("slo_class is interactive; lines of a batch are of class batch")
        if request.slo.slo_class == types_pb2.SLO_CLASS_UNSPECIFIED:
            request.slo.slo_class = types_pb2.SLO_CLASS_BATCH
        try:
            slo = slo_fields(request.slo)
        except ValueError as error:
            raise invalid_argument(str(error)) from None
        content = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        checked = await self._check(request)
        return NewLine(
            custom_id=line.custom_id,
            request=checked.message.SerializeToString(deterministic=True),
            prompt_tokens=checked.prompt_tokens,
            max_tokens=checked.max_tokens,
            ttft_slo_s=slo["ttft_s"],
            itl_slo_s=slo["itl_s"],
            deadline=self._after(slo["deadline_s"]),
            content=content,
        )

    def _batch(self, spec: batch_pb2.BatchSpec) -> NewBatch:
        return NewBatch(
            batch_id=spec.batch_id or f"batch_{uuid.uuid4().hex}",
            name=spec.name,
            metadata=dict(spec.metadata),
            deadline=self._after(_window(spec, "completion_window_s")),
            expires_at=self._after(_window(spec, "expire_after_s")),
        )

    def _after(self, seconds: float | None) -> float | None:
        """Whole milliseconds, at least one: the same window sent again must give the same content."""
        return None if seconds is None else self._now + max(0.001, round(seconds, 3))


def _window(spec: batch_pb2.BatchSpec, name: str) -> float | None:
    if not spec.HasField(name):
        return None
    value: float = getattr(spec, name)
    if not (math.isfinite(value) and 0.0 < value <= MAX_TARGET_S):
        raise invalid_argument(f"{name} is {value}; it must be a positive finite number of seconds")
    return value
