"""The Python API over an engine core that is already there: blocking and streaming."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.requests import build_request
from chiron_engine.gateway.text import ModelText
from chiron_engine.policy.iteration.plan import TokenLogprobs
from chiron_engine.policy.iteration.sampling_params import Guide, SamplingParams

from .engine_loop import EngineLoop
from .offline_batch import OfflineBatch
from .outputs import OutputCollector, RequestOutput
from .progress import GenerationProgress
from .token_streams import TokenStreams
from .turns import CallerTurns, LoopTurns, Turns

Prompt = str | Sequence[int]
Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """A piece of a stream. `output` is set in the last one only, and covers the whole request. logprobs:
    of the token, where they are asked for."""

    text: str
    token_ids: list[int]
    output: RequestOutput | None = None
    logprobs: TokenLogprobs | None = None


class OfflineEngine:
    """Generates text in this process. `LLM` is this with a model loaded.

    `generate` and `chat` run the core in the calling thread; after the first `stream` a thread of
    its own runs it, and they wait for that. All may be called from several threads.
    """

    def __init__(
        self,
        core: EngineCore,
        config: EngineConfig,
        text: ModelText,
        eos_token_ids: Iterable[int],
        resources: ExitStack,
        compile_guide: Callable[[Guide], object] | None = None,
    ) -> None:
        """`resources` are closed with this; the core is among them where it needs closing. compile_guide:
        as in LoadedModel."""
        self.config = config
        self.text = text
        self._core = core
        self._eos_token_ids = tuple(eos_token_ids)
        self._resources = resources
        self._compile_guide = compile_guide
        self._request_ids = itertools.count(1)
        self._seeds = random.Random(config.seed)
        # Held by whoever runs the core, until the loop's thread takes it over.
        self._lock = threading.Lock()
        self._loop: EngineLoop | None = None
        self._streams: TokenStreams | None = None
        self._closed = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: Sequence[str] = (),
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete texts or token ids, all of them batched; outputs in the order of the prompts.

        prompts: one or many. sampling_params: one for all, or one each. stop: strings that end an
        output, not part of its text. progress: show a bar on standard error.

        Raises ValueError (InvalidRequest, TextError) for a prompt or parameters the model cannot
        take, before anything runs.
        """
        return self._run(
            [self._encode(prompt) for prompt in _as_list(prompts)], sampling_params, stop, progress
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: Sequence[str] = (),
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer a conversation, or many: lists of {"role": ..., "content": ...}, rendered with the
        model's chat template. Otherwise like `generate`."""
        prompts = [self.text.encode_chat(conversation) for conversation in _as_conversations(messages)]
        return self._run(prompts, sampling_params, stop, progress)

    async def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
    ) -> AsyncIterator[StreamChunk]:
        """Tokens of one request as they come; `prompt` may also be a conversation.

        Many streams share the engine's batch. Leaving the iteration early aborts the request.
        Raises ValueError as `generate` does, QueueFull when too many requests wait.
        """
        streams = await asyncio.to_thread(self._start_loop)
        prompt_ids = self._encode(prompt)
        collector = self._collector(prompt_ids, sampling_params or SamplingParams(), stop)
        tokens = streams.run(collector.request, collector.add_prompt)
        try:
            async for now, (token_id, logprobs) in tokens:
                text = collector.add(token_id, now, logprobs)
                yield StreamChunk(text, [token_id], logprobs=logprobs)
                if collector.stopped:
                    break
        finally:
            await tokens.aclose()
        rest, output = collector.finish(self._core.clock.now())
        yield StreamChunk(rest, [], output)

    def close(self) -> None:
        """Release the model and its memory. Streams still open end; may be called more than once."""
        if self._closed:
            return
        self._closed = True
        with self._lock:
            if self._loop is not None:
                self._loop.stop()
                self._loop.ended.result()
            self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, prompt: Prompt | Sequence[Message]) -> Sequence[int]:
        if isinstance(prompt, str):
            return self.text.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            return self.text.encode_chat(prompt)  # type: ignore[arg-type]
        return prompt  # type: ignore[return-value]

    def _collector(
        self, prompt_ids: Iterable[int], sampling: SamplingParams, stop: Sequence[str]
    ) -> OutputCollector:
        guide = None
        if sampling.guide is not None and self._compile_guide is not None:
            guide = self._compile_guide(sampling.guide)
        request = build_request(
            next(self._request_ids),
            prompt_ids,
            sampling,
            shape=self._core.shape,
            eos_token_ids=self._eos_token_ids,
            draw_seed=lambda: self._seeds.getrandbits(64),
            arrival=self._core.clock.now(),
            guide=guide,
        )
        return OutputCollector(request, self.text.detokenizer(), stop)

    def _run(
        self,
        prompts: Sequence[Iterable[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        stop: Sequence[str],
        progress: bool,
    ) -> list[RequestOutput]:
        sampling = _per_prompt(sampling_params, len(prompts))
        collectors = [
            self._collector(ids, params, stop) for ids, params in zip(prompts, sampling, strict=True)
        ]
        with GenerationProgress(len(prompts), progress) as shown:
            if self._loop is None:
                with self._lock:
                    if self._loop is None:
                        return self._batch(collectors, CallerTurns(self._open_core()), shown)
            return self._batch(collectors, LoopTurns(self._loop), shown)

    def _batch(
        self, collectors: list[OutputCollector], turns: Turns, shown: GenerationProgress
    ) -> list[RequestOutput]:
        return OfflineBatch(
            collectors,
            turns,
            self._core.clock,
            window=self.config.max_queued_requests,
            on_finished=shown.add,
        ).run()

    def _open_core(self) -> EngineCore:
        if self._closed:
            raise RuntimeError("the engine is closed")
        return self._core

    def _start_loop(self) -> TokenStreams:
        with self._lock:
            if self._streams is None:
                loop = EngineLoop(self._open_core(), name="offline-engine")
                self._streams = TokenStreams(loop, self._core.clock)
                loop.start()
                self._loop = loop
            return self._streams


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt as a list of one: a string, or ids."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _as_conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
) -> Sequence[Sequence[Message]]:
    if messages and isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]
    return messages  # type: ignore[return-value]


def _per_prompt(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> Sequence[SamplingParams]:
    if sampling_params is None:
        sampling_params = SamplingParams()
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * prompts
    if len(sampling_params) != prompts:
        raise ValueError(
            f"{len(sampling_params)} sampling_params for {prompts} prompts; give one, or one each"
        )
    return sampling_params
