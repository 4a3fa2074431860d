"""The Inference service: checks requests, has them run, and turns their tokens into client chunks."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
import grpc.aio

from chiron_engine import __version__
from chiron_engine.rpc.errors import RpcFailure, exhausted, invalid_argument, unavailable
from chiron_engine.rpc.v1 import engine_pb2, inference_pb2, inference_pb2_grpc

from . import limits
from .chunk_writer import ChunkWriter
from .engine_router import EngineRouter
from .generation import Generation, Prompt
from .text import ModelText, TextError

# Text up to this many characters is tokenised in well under a millisecond, quicker than a hop
# to another thread.
SHORT_TEXT_CHARS = 2048
TEXT_THREADS = 2
# A client that takes no byte for this long has its request aborted.
WRITE_TIMEOUT_S = 60.0

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request between its receipt and the end of its stream."""

    request_id: str
    received: float
    generations: list[Generation] = field(default_factory=list)
    is_aborted: bool = False
    waits: bool = True  # for its first token

    def abort(self) -> None:
        self.is_aborted = True
        for generation in self.generations:
            generation.abort()


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Runs on one event loop; long texts and chat templates go to threads."""

    def __init__(
        self,
        text: ModelText,
        model_name: str,
        router: EngineRouter,
        max_queued_requests: int,
        seed: int = 0,
    ) -> None:
        """seed: where the seeds of requests that bring none start."""
        self._text = text
        self._model_name = model_name
        self._router = router
        self._max_queued_requests = max_queued_requests
        self._seeds = random.Random(seed)
        self._live: dict[str, LiveRequest] = {}
        self._waiting = 0
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")

    async def drain(self) -> None:
        """Refuse new requests and wait for those here to end."""
        self._draining = True
        await self._empty.wait()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        received = time.monotonic()
        live = self._admit(limits.check_request_id(request.request_id), received)
        try:
            async with asyncio.timeout(context.time_remaining()):
                await self._generate(request, live, context)
        except TimeoutError:
            raise RpcFailure(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "the deadline of the call passed before the request ended",
                error_code="deadline_exceeded",
            ) from None
        finally:
            self._release(live)

    async def Abort(
        self, request: inference_pb2.AbortRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.AbortResponse:
        if not request.request_id:
            raise invalid_argument(f"request_id is empty; {limits.REQUEST_ID_RULE}")
        live = self._live.get(limits.check_request_id(request.request_id))
        if live is None:
            raise RpcFailure(
                grpc.StatusCode.NOT_FOUND,
                f"no request with the id {request.request_id} is running here",
                error_code="not_found",
            )
        live.abort()
        return inference_pb2.AbortResponse()

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        kind = request.WhichOneof("input")
        if kind == "text":
            special = not request.HasField("add_special_tokens") or request.add_special_tokens
            ids = await self._encode(request.text, special)
        elif kind == "chat":
            if request.HasField("add_special_tokens"):
                raise invalid_argument(
                    "add_special_tokens applies to text only; a chat template brings its own"
                )
            ids = await self._encode_chat(limits.check_messages(request.chat))
        else:
            raise invalid_argument("input is not set; send text or chat")
        return inference_pb2.TokenizeResponse(token_ids=ids)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.DetokenizeResponse:
        ids = list(request.token_ids)
        text = await self._with_text(
            len(ids) <= SHORT_TEXT_CHARS, lambda: self._text.decode(ids, request.skip_special_tokens)
        )
        return inference_pb2.DetokenizeResponse(text=text)

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ModelInfo:
        hello = self._hello()
        return inference_pb2.ModelInfo(
            name=self._model_name,
            architecture=hello.architecture,
            vocab_size=hello.vocab_size,
            max_model_len=hello.max_model_len,
            eos_token_ids=hello.eos_token_ids,
            dtype=hello.dtype,
            has_chat_template=self._text.has_chat_template,
            engines=self._router.num_ready,
            version=__version__,
        )

    async def resolve(self, request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
        """A request to be run later: checked as `Generate` does, with token ids in place of text, and
        with seed and max_tokens. Raises RpcFailure."""
        for name in ("logprobs", "prompt_logprobs"):
            if request.sampling.HasField(name):
                raise invalid_argument(f"{name} are not kept for batches; leave them out")
        if request.n > 1:
            raise invalid_argument(f"n is {request.n}; a line of a batch has one output")
        prompt = await self._check(request)
        resolved = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt.token_ids),
            sampling=prompt.sampling,
            slo=prompt.slo,
            stop=prompt.stops,
        )
        if not resolved.sampling.HasField("max_tokens"):
            resolved.sampling.max_tokens = self._hello().max_model_len - len(prompt.token_ids)
        return resolved

    def _admit(self, request_id: str, received: float) -> LiveRequest:
        if self._draining:
            raise unavailable("the server is shutting down and takes no new requests", "draining")
        if request_id in self._live:
            raise RpcFailure(
                grpc.StatusCode.ALREADY_EXISTS,
                f"a request with the id {request_id} is running; ids must differ among live requests",
                error_code="already_exists",
            )
        if self._waiting >= self._max_queued_requests:
            raise exhausted(
                f"{self._waiting} requests wait for their first token, which is the limit; try again later",
                "rate_limit_exceeded",
            )
        live = self._live[request_id] = LiveRequest(request_id, received)
        self._waiting += 1
        self._empty.clear()
        return live

    def _release(self, live: LiveRequest) -> None:
        self._stop_waiting(live)
        del self._live[live.request_id]
        for generation in live.generations:
            generation.abort()
        if not self._live:
            self._empty.set()

    def _stop_waiting(self, live: LiveRequest) -> None:
        if live.waits:
            live.waits = False
            self._waiting -= 1

    async def _generate(
        self, request: inference_pb2.GenerateRequest, live: LiveRequest, context: grpc.aio.ServicerContext
    ) -> None:
        prompt = await self._check(request)
        for index in range(max(1, request.n)):
            choice = prompt.choice(index) if index else prompt
            live.generations.append(
                Generation(choice, live.request_id, live.received, self._text, self._router, index)
            )
        if live.is_aborted:
            live.abort()
        async with ChunkWriter(context, WRITE_TIMEOUT_S) as writer:
            await _run_all(live.generations, writer, lambda: self._stop_waiting(live))

    async def _check(self, request: inference_pb2.GenerateRequest) -> Prompt:
        """Everything that can be wrong with a request, before an engine sees it."""
        hello = self._hello()
        if request.model not in ("", self._model_name):
            raise RpcFailure(
                grpc.StatusCode.NOT_FOUND,
                f"this server serves {self._model_name}; the request names another model",
                error_code="model_not_found",
            )
        stops = limits.check_stops(request.stop)
        if stops and not self._text.has_tokenizer:
            raise invalid_argument("stop holds text and this server has no tokenizer; use stop_token_ids")
        sampling = limits.check_sampling(request.sampling, hello.vocab_size)
        limits.check_choices(request.n, sampling)
        limits.check_slo(request.slo)
        ids = await self._prompt_ids(request, hello)
        limits.check_length(len(ids), sampling, hello.max_model_len)
        if not request.sampling.HasField("seed"):
            # Here and not in an engine: should the request go on at another one, it draws as before.
            request.sampling.seed = self._seeds.getrandbits(64)
        return Prompt(ids, request.sampling, request.slo, stops)

    async def _prompt_ids(self, request: inference_pb2.GenerateRequest, hello: engine_pb2.Hello) -> list[int]:
        kind = request.WhichOneof("prompt")
        if kind == "token_ids":
            return limits.check_token_ids(request.token_ids.ids, hello.vocab_size)
        if kind == "text":
            self._check_size(request.text, hello)
            ids = await self._encode(request.text, True)
        elif kind == "chat":
            messages = limits.check_messages(request.chat)
            ids = await self._encode_chat(messages, hello)
        else:
            raise invalid_argument("prompt is not set; send text, chat or token_ids")
        return limits.check_token_ids(ids, hello.vocab_size, "the tokenized prompt")

    def _check_size(self, text: str, hello: engine_pb2.Hello) -> None:
        if self._text.surely_over(text, hello.max_model_len):
            raise limits.over_context(f"the prompt has {len(text)} characters", hello.max_model_len)

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return await self._with_text(
            len(text) <= SHORT_TEXT_CHARS, lambda: self._text.encode(text, add_special_tokens)
        )

    async def _encode_chat(
        self, messages: list[dict[str, str]], hello: engine_pb2.Hello | None = None
    ) -> list[int]:
        rendered = await self._with_text(False, lambda: self._text.render_chat(messages))
        if hello is not None:
            self._check_size(rendered, hello)
        return await self._encode(rendered, False)

    async def _with_text(self, quick: bool, work: Callable[[], T]) -> T:
        """Run `work` here if it is quick, otherwise in a thread."""
        try:
            if quick:
                return work()
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TextError as error:
            raise invalid_argument(str(error)) from None

    def _hello(self) -> engine_pb2.Hello:
        hello = self._router.hello
        if hello is None:
            raise unavailable("no engine is ready yet; the model may still be loading", "model_loading")
        return hello


async def _run_all(
    generations: Sequence[Generation], writer: ChunkWriter, on_first_token: Callable[[], None]
) -> None:
    """Raises the RpcFailure of one where one fails: the others are aborted, and end before. None is
    cancelled, as gRPC takes no status while a write is under way."""
    if len(generations) == 1:
        await generations[0].run(writer, on_first_token)
        return
    running = {asyncio.create_task(one.run(writer, on_first_token)) for one in generations}
    try:
        await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
        for generation in generations:
            generation.abort()  # without effect where all have ended
        await asyncio.wait(running)
    finally:  # the client is gone, or reads nothing
        for task in running:
            task.cancel()
    for task in running:
        task.result()
