"""Prompts answered by a running server, over gRPC."""

from __future__ import annotations

import asyncio
import json
import sys

import grpc.aio

from chiron_engine.rpc import client
from chiron_engine.rpc.client import InferenceClient
from chiron_engine.rpc.v1 import inference_pb2, types_pb2

from .console import note
from .remote_errors import remote_failure
from .request_options import RequestOptions

CONCURRENT = 64
SLO_CLASSES = {
    None: types_pb2.SLO_CLASS_UNSPECIFIED,
    "interactive": types_pb2.SLO_CLASS_INTERACTIVE,
    "batch": types_pb2.SLO_CLASS_BATCH,
}


class RemoteGenerator:
    """Sends prompts to the server at `address` (host:port) and prints the answers."""

    def __init__(self, address: str, options: RequestOptions, chat: bool) -> None:
        self._address = address
        self._options = options
        self._chat = chat

    async def run(self, prompts: list[str], as_json: bool) -> int:
        """Text as it comes, one prompt after another; or JSON lines in the order of the prompts,
        many of them at once. Returns how many failed; as text, the first failure ends it with
        CommandError."""
        async with InferenceClient(self._address) as inference:
            if as_json:
                return await self._print_json(inference, prompts)
            for prompt in prompts:
                await self._stream_text(inference, prompt)
        return 0

    async def _stream_text(self, inference: InferenceClient, prompt: str) -> None:
        try:
            async for chunk in inference.generate(self._request(prompt), self._options.timeout):
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        except grpc.aio.AioRpcError as error:
            raise remote_failure(self._address, error) from None
        print(flush=True)

    async def _print_json(self, inference: InferenceClient, prompts: list[str]) -> int:
        gate = asyncio.Semaphore(CONCURRENT)

        async def answer(prompt: str) -> dict[str, object]:
            async with gate:
                return await self._answer(inference, prompt)

        failed = 0
        for answering in [asyncio.create_task(answer(prompt)) for prompt in prompts]:
            try:
                line = await answering
            except grpc.aio.AioRpcError as error:
                failed += 1
                line = {"error": remote_failure(self._address, error).message}
                note(f"chiron: {line['error']}")
            print(json.dumps(line, ensure_ascii=False), flush=True)
        return failed

    async def _answer(self, inference: InferenceClient, prompt: str) -> dict[str, object]:
        request = self._request(prompt)
        if self._chat:
            tokenize = inference_pb2.TokenizeRequest(chat=request.chat)
        else:
            tokenize = inference_pb2.TokenizeRequest(text=prompt)
        tokenized = await inference.stub.Tokenize(tokenize)
        chunks = await inference.generate_all(request, self._options.timeout)
        return {"prompt_token_ids": list(tokenized.token_ids), **_output_fields(chunks)}

    def _request(self, prompt: str) -> inference_pb2.GenerateRequest:
        options = self._options
        request = inference_pb2.GenerateRequest(
            sampling=client.sampling(**options.sampling_fields()),
            slo=types_pb2.Slo(
                slo_class=SLO_CLASSES[options.slo_class],
                ttft_slo_ms=options.ttft_slo_ms,
                itl_slo_ms=options.itl_slo_ms,
            ),
            stop=options.stop,
        )
        if self._chat:
            request.chat.CopyFrom(client.chat([("user", prompt)]))
        else:
            request.text = prompt
        return request


def _output_fields(chunks: list[inference_pb2.GenerateChunk]) -> dict[str, object]:
    """The same fields as an offline output has."""
    last = chunks[-1]
    reason = types_pb2.FinishReason.Name(last.finish_reason)
    return {
        "token_ids": [token for chunk in chunks for token in chunk.token_ids],
        "text": "".join(chunk.text for chunk in chunks),
        "finish_reason": reason.removeprefix("FINISH_REASON_").lower(),
        "timing": {
            "ttft_ms": last.timing.ttft_ms,
            "mean_itl_ms": last.timing.mean_itl_ms,
            "max_itl_ms": last.timing.max_itl_ms,
            "total_ms": last.timing.total_ms,
            "queue_ms": last.timing.queue_ms,
            "preemptions": last.timing.preemptions,
            "cached_tokens": last.usage.cached_tokens,
        },
        "logprobs": [_logprobs(one) for chunk in chunks for one in chunk.logprobs] or None,
        "prompt_logprobs": [_logprobs(one) for chunk in chunks for one in chunk.prompt_logprobs] or None,
    }


def _logprobs(message: types_pb2.TokenLogprobs) -> dict[str, object]:
    return {
        "logprob": message.logprob,
        "top_ids": list(message.top_ids),
        "top_logprobs": list(message.top_logprobs),
        "rank": message.rank if message.HasField("rank") else None,
    }
