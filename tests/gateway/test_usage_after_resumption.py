"""What a client is told of its request's tokens, also where it ran on several engines."""

from __future__ import annotations

import asyncio
import time

from chiron_engine.gateway.batch_text import BatchText
from chiron_engine.gateway.chunk_writer import ChunkWriter
from chiron_engine.gateway.engine_pool import EnginePool
from chiron_engine.gateway.generation import Generation, Prompt
from chiron_engine.gateway.no_tokenizer import NoTokenizer
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import engine_pb2, inference_pb2, types_pb2

PROMPT = [1, 2, 3]
FINISHED = engine_pb2.Finished(reason=types_pb2.FINISH_REASON_LENGTH, cached_tokens=64)
"""Of the last engine, which was sent the output of the one before it as prompt."""


class Ending(EnginePool):
    """Ends each request at its second token."""

    def submit(self, stream: TokenStream, received: float) -> None:
        for token in (7, 8):
            stream.push(token, received)
        stream.finish(FINISHED)


class Chunks:
    """What a servicer context is asked to write."""

    def __init__(self) -> None:
        self.written: list[inference_pb2.GenerateChunk] = []

    async def send_initial_metadata(self, metadata: object) -> None:
        """Nobody reads it."""

    async def write(self, chunk: inference_pb2.GenerateChunk) -> None:
        self.written.append(chunk)


def test_no_more_of_a_prompt_is_cached_than_there_is() -> None:
    async def check() -> None:
        prompt = Prompt(PROMPT, types_pb2.SamplingParams(), types_pb2.Slo(), [])
        chunks = Chunks()
        generation = Generation(prompt, "r", time.monotonic(), NoTokenizer(), Ending([]))
        async with ChunkWriter(chunks, 60.0) as writer:  # type: ignore[arg-type]
            await generation.run(writer, lambda: None)
        usage = chunks.written[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 2, 3)

    asyncio.run(check())


class Late(EnginePool):
    """Has a first token and what the prompt's were worth; the rest comes once the client is written to."""

    def submit(self, stream: TokenStream, received: float) -> None:
        self.stream = stream
        stream.prompt_logprobs += [types_pb2.TokenLogprobs(logprob=-1.0)] * 2
        stream.push(7, received)


def test_tokens_that_come_while_a_prompt_is_told_are_not_lost() -> None:
    engines = Late([])

    class Slow(Chunks):
        async def write(self, chunk: inference_pb2.GenerateChunk) -> None:
            if not self.written:
                for token in (8, 9):
                    engines.stream.push(token, time.monotonic())
                engines.stream.finish(FINISHED)
            await super().write(chunk)

    async def check() -> None:
        prompt = Prompt(PROMPT, types_pb2.SamplingParams(), types_pb2.Slo(), [])
        chunks = Slow()
        generation = Generation(prompt, "r", time.monotonic(), NoTokenizer(), engines)
        async with ChunkWriter(chunks, 60.0) as writer:  # type: ignore[arg-type]
            await generation.run(writer, lambda: None)
        assert [token for chunk in chunks.written for token in chunk.token_ids] == [7, 8, 9]
        assert chunks.written[-1].usage.completion_tokens == 3

    asyncio.run(check())


def test_the_next_engine_is_told_what_of_the_prompt_was_output() -> None:
    """And how much of it is still owed."""

    class Engine:
        def abort(self, handle: int) -> None: ...

        def abandon(self, handle: int) -> None: ...

        def take_back(self, handle: int) -> None: ...

    params = types_pb2.SamplingParams(max_tokens=9, min_tokens=4)
    stream = TokenStream(PROMPT, params, types_pb2.Slo(), "r", EnginePool([]), tokens=[7, 8])
    submit = stream.submission(Engine(), 1)
    assert list(submit.prompt_token_ids) == [*PROMPT, 7, 8]
    assert submit.prior_outputs == 2
    assert (submit.sampling.max_tokens, submit.sampling.min_tokens) == (7, 2)
    assert (params.max_tokens, params.min_tokens) == (9, 4)


def test_nor_of_the_prompt_of_a_batch_line() -> None:
    request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=PROMPT))
    usage = BatchText(NoTokenizer()).output(request, [7, 8], FINISHED).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 2, 3)


def test_the_prompt_is_scored_once() -> None:
    """An engine that gets a request with output need not; the client has it before the first token."""
    found = [types_pb2.TokenLogprobs(logprob=-float(place), rank=place + 1) for place in range(9000)]

    class Scoring(EnginePool):
        def submit(self, stream: TokenStream, received: float) -> None:
            assert stream.submission(self, 1).sampling.prompt_logprobs == 3  # type: ignore[arg-type]
            stream.prompt_logprobs = list(found)
            stream.push(7, received)
            assert not stream.submission(self, 2).sampling.HasField("prompt_logprobs")  # type: ignore[arg-type]
            stream.push(8, received)
            stream.finish(FINISHED)

    async def check() -> None:
        sampling = types_pb2.SamplingParams(prompt_logprobs=3, seed=1)
        prompt, chunks = Prompt(PROMPT, sampling, types_pb2.Slo(), []), Chunks()
        assert not prompt.choice(1).sampling.HasField("prompt_logprobs")
        generation = Generation(prompt, "r", time.monotonic(), NoTokenizer(), Scoring([]))
        async with ChunkWriter(chunks, 60.0) as writer:  # type: ignore[arg-type]
            await generation.run(writer, lambda: None)
        assert [one for chunk in chunks.written for one in chunk.prompt_logprobs] == found
        assert max(len(chunk.prompt_logprobs) for chunk in chunks.written) < 5000
        assert chunks.written[0].prompt_logprobs and not chunks.written[0].token_ids

    asyncio.run(check())
