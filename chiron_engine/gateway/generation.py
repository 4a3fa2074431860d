"""One output for a client: from its tokens to the chunks that are read."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace

from chiron_engine.rpc.errors import exhausted
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import engine_pb2, inference_pb2, types_pb2

from .chunk_writer import ChunkWriter
from .engine_router import EngineRouter
from .output_text import OutputText
from .text import ModelText

# How long to wait for the engine's last word on a request that a stop string ended.
STOP_REPORT_TIMEOUT_S = 2.0
PROMPT_TOKENS_PER_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Prompt:
    """A checked request, as an engine takes it."""

    token_ids: list[int]
    sampling: types_pb2.SamplingParams
    slo: types_pb2.Slo
    stops: list[str]

    def choice(self, index: int) -> Prompt:
        """For output `index` of several: draws of its own."""
        sampling = types_pb2.SamplingParams()
        sampling.CopyFrom(self.sampling)
        sampling.seed = (sampling.seed + index) % (1 << 64)
        sampling.ClearField("prompt_logprobs")  # those of output 0 are the same
        return replace(self, sampling=sampling)


class Generation:
    """Submits on construction; `run` streams to the client; `abort` may come at any time."""

    def __init__(
        self,
        prompt: Prompt,
        request_id: str,
        received: float,
        text: ModelText,
        router: EngineRouter,
        index: int = 0,
    ) -> None:
        """received: when the request came in, on `time.monotonic`. index: which of its outputs."""
        self._request_id = request_id
        self._index = index
        self._received = received
        self._prompt_tokens = len(prompt.token_ids)
        self._completion_tokens = 0
        self._text = OutputText(text.detokenizer(), prompt.stops, prompt.sampling.min_tokens)
        self._stream = TokenStream(prompt.token_ids, prompt.sampling, prompt.slo, request_id, router)
        router.submit(self._stream, received)

    def abort(self) -> None:
        """End the request, if it has not ended."""
        self._stream.abort()

    async def run(self, writer: ChunkWriter, on_first_token: Callable[[], None]) -> None:
        """Stream every chunk; waits while the client does not read. Raises RpcFailure."""
        stream = self._stream
        while True:
            tokens = await stream.next()
            if tokens:
                on_first_token()
            if stream.overflowed:
                raise exhausted("the output is read too slowly; the request was ended", "slow_reader", None)
            # Both before anything is awaited: what comes meanwhile belongs to the next round.
            chunk, has_ended = self._chunk(tokens, stream), stream.has_ended
            await self._write_prompt(writer)
            if self._text.is_stopped:
                await self._end_at_stop_string(chunk, writer)
                return
            if has_ended:
                await self._end(chunk, writer)
                return
            if chunk.token_ids:
                await writer.write(chunk)

    async def _write_prompt(self, writer: ChunkWriter) -> None:
        """In chunks that clients take with gRPC's default limits."""
        found, self._stream.prompt_logprobs = self._stream.prompt_logprobs, []
        for start in range(0, len(found), PROMPT_TOKENS_PER_CHUNK):
            part = found[start : start + PROMPT_TOKENS_PER_CHUNK]
            await writer.write(
                inference_pb2.GenerateChunk(
                    request_id=self._request_id, prompt_logprobs=part, index=self._index
                )
            )

    def _chunk(self, tokens: array[int], stream: TokenStream) -> inference_pb2.GenerateChunk:
        """Tokens up to a stop string."""
        finished = stream.finished
        ends_with_stop_token = finished is not None and finished.reason == types_pb2.FINISH_REASON_STOP
        text, taken = self._text.feed_all(tokens, ends_with_stop_token)
        before, self._completion_tokens = self._completion_tokens, self._completion_tokens + taken
        return inference_pb2.GenerateChunk(
            request_id=self._request_id,
            text=text,
            token_ids=tokens[:taken],
            logprobs=stream.logprobs[before : self._completion_tokens],
            index=self._index,
        )

    async def _end_at_stop_string(self, chunk: inference_pb2.GenerateChunk, writer: ChunkWriter) -> None:
        """The text goes out at once; the last chunk waits for the engine's counters, a step away."""
        self._stream.abort()
        if chunk.text or chunk.token_ids:
            await writer.write(chunk)
        try:
            async with asyncio.timeout(STOP_REPORT_TIMEOUT_S):
                await self._stream.wait_ended()
        except TimeoutError:
            pass  # the counters of the last chunk stay 0
        last = inference_pb2.GenerateChunk(request_id=self._request_id, index=self._index)
        await self._write_last(last, types_pb2.FINISH_REASON_STOP, writer)

    async def _end(self, chunk: inference_pb2.GenerateChunk, writer: ChunkWriter) -> None:
        """The stream has ended, well or badly. What came before a failure is still delivered."""
        failure = self._stream.failure
        if failure is not None:
            if chunk.token_ids:
                await writer.write(chunk)
            raise failure
        finished = self._stream.finished
        assert finished is not None  # one of the two is set
        chunk.text += self._text.finish()
        reason = types_pb2.FINISH_REASON_STOP if self._text.is_stopped else finished.reason
        await self._write_last(chunk, reason, writer)

    async def _write_last(
        self, chunk: inference_pb2.GenerateChunk, reason: types_pb2.FinishReason, writer: ChunkWriter
    ) -> None:
        finished = self._stream.finished or engine_pb2.Finished()
        chunk.finish_reason = reason
        chunk.usage.prompt_tokens = self._prompt_tokens
        chunk.usage.completion_tokens = self._completion_tokens
        # One that went on at another engine brought its output there as prompt.
        chunk.usage.cached_tokens = min(finished.cached_tokens, self._prompt_tokens)
        chunk.timing.CopyFrom(self._timing(finished))
        await writer.write(chunk)

    def _timing(self, finished: engine_pb2.Finished) -> inference_pb2.Timing:
        times = self._stream.times
        gaps = max(1, times.count - 1)
        return inference_pb2.Timing(
            ttft_ms=(times.first - self._received) * 1e3 if times.count else 0.0,
            mean_itl_ms=(times.last - times.first) / gaps * 1e3,
            max_itl_ms=times.longest_gap * 1e3,
            total_ms=(time.monotonic() - self._received) * 1e3,
            queue_ms=finished.queue_s * 1e3,
            preemptions=finished.preemptions,
        )
