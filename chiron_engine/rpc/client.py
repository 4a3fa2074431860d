"""Typed clients of our services, on asyncio: for the command line, the benchmarks and the tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .options import MAX_MESSAGE_BYTES, channel_options
from .v1 import (
    batch_pb2,
    batch_pb2_grpc,
    coordinator_pb2,
    coordinator_pb2_grpc,
    engine_pb2,
    engine_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    types_pb2,
)

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
ENGINE_SERVICE = engine_pb2.DESCRIPTOR.services_by_name["Engine"].full_name
HEALTH_POLL_S = 0.05
SUBMIT_PAGE_BYTES = 1 << 20


def open_channel(address: str, max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    """A plaintext channel to `host:port`. Opened lazily: calls fail, not this."""
    return grpc.aio.insecure_channel(address, options=channel_options(max_message_bytes))


class _Client:
    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = open_channel(address)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.channel.close()

    async def is_serving(self, service: str = "", timeout: float = 2.0) -> bool:
        """What the health service says; False also where nobody answers."""
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await self._health.Check(request, timeout=timeout)
        except grpc.aio.AioRpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def wait_serving(self, timeout: float, service: str = "") -> None:
        """Return once the server says SERVING. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while not await self.is_serving(service):
                await asyncio.sleep(HEALTH_POLL_S)


class InferenceClient(_Client):
    """The client face of a gateway. Calls raise grpc.aio.AioRpcError."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)

    def generate(
        self, request: inference_pb2.GenerateRequest, timeout: float | None = None
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        """Stream the chunks of one request; the call object also has `cancel()`."""
        return self.stub.Generate(request, timeout=timeout)

    async def generate_all(
        self, request: inference_pb2.GenerateRequest, timeout: float | None = None
    ) -> list[inference_pb2.GenerateChunk]:
        return [chunk async for chunk in self.generate(request, timeout)]

    async def abort(self, request_id: str) -> None:
        await self.stub.Abort(inference_pb2.AbortRequest(request_id=request_id))

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        request = inference_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list((await self.stub.Tokenize(request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        request = inference_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return str((await self.stub.Detokenize(request)).text)

    async def model_info(self, timeout: float | None = None) -> inference_pb2.ModelInfo:
        return await self.stub.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=timeout)


class BatchClient(_Client):
    """Batches of requests, stored by the server. Calls raise grpc.aio.AioRpcError."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.stub = batch_pb2_grpc.BatchStub(self.channel)

    async def submit(
        self, spec: batch_pb2.BatchSpec, lines: Iterable[batch_pb2.BatchLine], timeout: float | None = None
    ) -> batch_pb2.BatchInfo:
        """Returns once the whole is on the server's disk. Sent again with the same batch_id and content
        it changes nothing."""
        return await self.stub.Submit(_submit_pages(spec, lines), timeout=timeout)

    async def get(self, batch_id: str, timeout: float | None = None) -> batch_pb2.BatchInfo:
        return await self.stub.Get(batch_pb2.GetBatchRequest(batch_id=batch_id), timeout=timeout)

    async def list(
        self, limit: int = 0, after: str = "", timeout: float | None = None
    ) -> batch_pb2.ListBatchesResponse:
        """A page, the newest first; limit 0 takes the server's."""
        request = batch_pb2.ListBatchesRequest(limit=limit, after=after)
        return await self.stub.List(request, timeout=timeout)

    async def results(
        self, batch_id: str, timeout: float | None = None
    ) -> AsyncIterator[batch_pb2.LineResult]:
        """Results of the lines that have ended, by line number, page by page."""
        request = batch_pb2.ListResultsRequest(batch_id=batch_id)
        while True:
            page = await self.stub.Results(request, timeout=timeout)
            for result in page.results:
                yield result
            if not page.HasField("next_after"):
                return
            request.after = page.next_after

    async def cancel(self, batch_id: str, timeout: float | None = None) -> batch_pb2.BatchInfo:
        return await self.stub.Cancel(batch_pb2.CancelBatchRequest(batch_id=batch_id), timeout=timeout)


async def _submit_pages(
    spec: batch_pb2.BatchSpec, lines: Iterable[batch_pb2.BatchLine]
) -> AsyncIterator[batch_pb2.SubmitBatchRequest]:
    """Messages well under what a server takes, however long the batch is."""
    page, size = batch_pb2.SubmitBatchRequest(batch=spec), 0
    for line in lines:
        page.lines.append(line)
        size += line.ByteSize()
        if size >= SUBMIT_PAGE_BYTES:
            yield page
            page, size = batch_pb2.SubmitBatchRequest(), 0
    page.complete = True
    yield page


class EngineClient(_Client):
    """The face an engine shows to gateways and operators."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.stub = engine_pb2_grpc.EngineStub(self.channel)

    async def status(self, timeout: float | None = 5.0) -> engine_pb2.EngineStatus:
        return await self.stub.GetStatus(engine_pb2.GetStatusRequest(), timeout=timeout)

    def connect(self) -> grpc.aio.StreamStreamCall:
        """The bidirectional stream: write EngineCommand, read EngineEvent (the first is a Hello)."""
        return self.stub.Connect()


class CoordinatorClient(_Client):
    """What operators see and ask of a fleet. Calls raise grpc.aio.AioRpcError."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.stub = coordinator_pb2_grpc.CoordinatorStub(self.channel)

    async def fleet(self, timeout: float | None = 5.0) -> coordinator_pb2.Fleet:
        return await self.stub.GetFleet(coordinator_pb2.GetFleetRequest(), timeout=timeout)

    async def drain(self, instance_id: int, timeout: float | None = 5.0) -> bool:
        """False where the instance has ended already."""
        request = coordinator_pb2.DrainInstanceRequest(instance_id=instance_id)
        return not (await self.stub.DrainInstance(request, timeout=timeout)).gone

    async def retire(self, instance_id: int, timeout: float | None = 5.0) -> bool:
        """False where the instance has ended already."""
        request = coordinator_pb2.RetireInstanceRequest(instance_id=instance_id)
        return not (await self.stub.RetireInstance(request, timeout=timeout)).gone

    async def scale(
        self, min_instances: int | None = None, max_devices: int | None = None, timeout: float | None = 5.0
    ) -> coordinator_pb2.ScaleFleetResponse:
        """None leaves a bound as it is."""
        request = coordinator_pb2.ScaleFleetRequest(min_instances=min_instances, max_devices=max_devices)
        return await self.stub.ScaleFleet(request, timeout=timeout)


def chat(messages: Sequence[tuple[str, str]]) -> inference_pb2.ChatMessages:
    """Chat messages from (role, content) pairs."""
    return inference_pb2.ChatMessages(
        messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    )


def sampling(
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    max_tokens: int | None = None,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    min_p: float | None = None,
    min_tokens: int | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    json_schema: str | None = None,
    regex: str | None = None,
    grammar: str | None = None,
) -> types_pb2.SamplingParams:
    """A wire SamplingParams in which None leaves a field to its default."""
    return types_pb2.SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        min_p=min_p,
        min_tokens=min_tokens,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        json_schema=json_schema,
        regex=regex,
        grammar=grammar,
    )
