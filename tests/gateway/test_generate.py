"""Generate over real sockets: what a stream carries, how it ends, and what it leaves behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import grpc
import grpc.aio
import pytest

from chiron_engine.gateway.generation import Prompt
from chiron_engine.rpc.client import chat, sampling
from chiron_engine.rpc.errors import error_code, retry_after_ms
from chiron_engine.rpc.v1 import inference_pb2, types_pb2
from tests.gateway.serving_stack import (
    SHAPE,
    free_port,
    running_engine,
    running_gateway,
    serving,
    slow_executor,
    status_of,
)
from tests.gateway.tiny_model import END, write_tiny_model

Code = grpc.StatusCode
Request = inference_pb2.GenerateRequest
VOCAB = SHAPE.vocab_size


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def ids(*token_ids: int, **fields: object) -> Request:
    return Request(token_ids=inference_pb2.TokenIds(ids=token_ids), **fields)  # type: ignore[arg-type]


def scripted(seed: int, first: int, count: int) -> list[int]:
    """The null executor's output (see `scripted_token`)."""
    return [(seed * 31 + first * 7 + index * 13 + 1) % VOCAB for index in range(count)]


def tokens_of(chunks: Sequence[inference_pb2.GenerateChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def text_of(chunks: Sequence[inference_pb2.GenerateChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def decoded(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token != END).decode(errors="replace")


def test_several_outputs_draw_as_requests_with_the_next_seeds(model: Path) -> None:
    """And each ends by itself: at its own end, here at a stop string of one of them."""

    async def check() -> None:
        async with serving(model) as (client, engine):
            chosen = sampling(max_tokens=10, seed=5, ignore_eos=True)
            alone = [
                await client.generate_all(
                    ids(9, sampling=sampling(max_tokens=10, seed=seed, ignore_eos=True))
                )
                for seed in (5, 6, 7)
            ]
            texts = [text_of(one) for one in alone]
            parts = [texts[1][start : start + 3] for start in range(2, 7)]
            stop = next(part for part in parts if part not in texts[0] and part not in texts[2])
            chunks = await client.generate_all(ids(9, sampling=chosen, n=3, stop=[stop]))
            outputs = [[chunk for chunk in chunks if chunk.index == index] for index in range(3)]
            for output in outputs:
                assert [bool(chunk.finish_reason) for chunk in output] == [False] * (len(output) - 1) + [True]
            for index in (0, 2):
                assert tokens_of(outputs[index]) == tokens_of(alone[index])
                assert outputs[index][-1].usage.completion_tokens == 10
            assert outputs[1][-1].finish_reason == types_pb2.FINISH_REASON_STOP
            assert text_of(alone[1]).startswith(text_of(outputs[1]) + stop)
            await engine.wait_idle()

    asyncio.run(check())


def test_seeds_of_several_outputs_wrap_around() -> None:
    prompt = Prompt([1], types_pb2.SamplingParams(seed=2**64 - 1, top_k=3), types_pb2.Slo(), [])
    assert [prompt.choice(index).sampling.seed for index in range(3)] == [2**64 - 1, 0, 1]
    assert prompt.choice(1).sampling.top_k == 3 and prompt.sampling.seed == 2**64 - 1


def test_abort_and_disconnect_end_all_outputs(model: Path) -> None:
    async def check() -> None:
        async with serving(model, partial(slow_executor, 0.01)) as (client, engine):
            endless = ids(9, sampling=sampling(max_tokens=900, seed=1, ignore_eos=True), n=4, request_id="a")
            task = asyncio.create_task(client.generate_all(endless))
            await engine.wait_running(4)
            await client.abort("a")
            chunks = await task
            reasons = [chunk.finish_reason for chunk in chunks if chunk.finish_reason]
            assert reasons == [types_pb2.FINISH_REASON_ABORT] * 4
            await engine.wait_idle()
            task = asyncio.create_task(client.generate_all(endless))
            await engine.wait_running(4)
            task.cancel()
            await engine.wait_idle(5.0)

    asyncio.run(check())


def test_the_failure_of_one_output_ends_the_others(model: Path) -> None:
    async def check() -> None:
        async with (
            running_engine(partial(slow_executor, 0.01), max_queued_requests=2) as engine,
            running_gateway(model, [engine.client.address]) as gateway,
        ):
            asked = ids(9, sampling=sampling(max_tokens=900, seed=1, ignore_eos=True), n=16)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await gateway.client.generate_all(asked)
            assert caught.value.code() is Code.RESOURCE_EXHAUSTED
            await engine.wait_idle(5.0)

    asyncio.run(check())


def test_the_last_chunk_carries_reason_usage_and_timing(model: Path) -> None:
    async def check() -> None:
        async with serving(model) as (client, _):
            params = sampling(max_tokens=40, seed=1, ignore_eos=True)
            request = ids(3, 4, 5, request_id="mine", sampling=params)
            *chunks, last = await client.generate_all(request)
            expected = scripted(1, 3, 40)
            assert tokens_of([*chunks, last]) == expected
            assert text_of([*chunks, last]) == decoded(expected)
            assert {chunk.request_id for chunk in [*chunks, last]} == {"mine"}
            assert last.finish_reason == types_pb2.FINISH_REASON_LENGTH
            assert not any(c.finish_reason or c.HasField("usage") or c.HasField("timing") for c in chunks)
            assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 40)
            timing = last.timing
            assert 0 <= timing.queue_ms <= timing.ttft_ms <= timing.total_ms
            assert 0 <= timing.mean_itl_ms <= timing.max_itl_ms <= timing.total_ms

    asyncio.run(check())


def test_text_and_chat_prompts(model: Path) -> None:
    async def check() -> None:
        async with serving(model) as (client, _):
            params = sampling(max_tokens=4, seed=9)
            by_text = await client.generate_all(Request(text="zebra", sampling=params))
            assert tokens_of(by_text) == scripted(9, ord("z"), 4)
            assert by_text[-1].usage.prompt_tokens == 5

            messages = chat([("user", "hé")])
            by_chat = await client.generate_all(Request(chat=messages, sampling=params))
            rendered = "user: hé\nassistant: "
            assert by_chat[-1].usage.prompt_tokens == len(rendered.encode())
            answer = await client.stub.Tokenize(inference_pb2.TokenizeRequest(chat=messages))
            assert list(answer.token_ids) == await client.tokenize(rendered)
            assert await client.detokenize(list(answer.token_ids)) == rendered

    asyncio.run(check())


def test_end_token_stops_and_is_no_text(model: Path) -> None:
    """Seed 0 and prompt 0 give 1, 14, 27, ...; 256 comes where 13 i + 1 = 256 modulo 257."""
    place = next(i for i in range(VOCAB) if scripted(0, 0, i + 1)[-1] == END)

    async def check() -> None:
        async with serving(model) as (client, _):
            chunks = await client.generate_all(ids(0, sampling=sampling(seed=0)))
            expected = scripted(0, 0, place + 1)
            assert tokens_of(chunks) == expected
            assert text_of(chunks) == decoded(expected)
            assert chunks[-1].finish_reason == types_pb2.FINISH_REASON_STOP

            stop = expected[5]
            chunks = await client.generate_all(ids(0, sampling=sampling(seed=0, stop_token_ids=[stop])))
            assert tokens_of(chunks) == expected[:6]
            assert text_of(chunks) == decoded(expected[:5])
            assert chunks[-1].finish_reason == types_pb2.FINISH_REASON_STOP

    asyncio.run(check())


def test_stop_string_cuts_text_and_frees_the_engine(model: Path) -> None:
    """Of printable output `...`, stop at two neighbouring characters: a match across tokens."""
    tokens = scripted(0, 0, 400)
    place = next(i for i in range(1, 400) if all(0x21 <= t < 0x7F for t in tokens[i : i + 2]))
    stop = decoded(tokens[place : place + 2])
    first = decoded(tokens).index(stop)

    async def check() -> None:
        async with serving(model, partial(slow_executor, 0.002)) as (client, engine):
            params = sampling(seed=0, max_tokens=900, ignore_eos=True)
            request = ids(0, stop=["never\n", stop], sampling=params)
            chunks = await client.generate_all(request)
            assert text_of(chunks) == decoded(tokens)[:first]
            assert chunks[-1].finish_reason == types_pb2.FINISH_REASON_STOP
            assert chunks[-1].usage.completion_tokens == len(tokens_of(chunks)) == place + 2
            await engine.wait_idle()
            assert (await engine.status()).step < 100

    asyncio.run(check())


def test_64_streams_with_random_disconnects(model: Path) -> None:
    """Half the clients leave at a random moment. The others get exactly their tokens."""
    rng = random.Random(7)
    count, length = 64, 120

    async def stay(client: object, seed: int) -> None:
        chunks = await client.generate_all(request(seed))  # type: ignore[attr-defined]
        assert tokens_of(chunks) == scripted(seed, seed % VOCAB, length)
        assert chunks[-1].finish_reason == types_pb2.FINISH_REASON_LENGTH

    async def leave(client: object, seed: int, after: int) -> None:
        call = client.generate(request(seed))  # type: ignore[attr-defined]
        seen: list[int] = []
        async for chunk in call:
            seen += chunk.token_ids
            if len(seen) >= after:
                call.cancel()
                break
        assert seen == scripted(seed, seed % VOCAB, len(seen))

    def request(seed: int) -> Request:
        prompt = [seed % VOCAB, *[1] * (seed % 50)]
        return ids(*prompt, sampling=sampling(seed=seed, max_tokens=length, ignore_eos=True))

    async def check() -> None:
        async with serving(model, partial(slow_executor, 0.003)) as (client, engine):
            work = [
                leave(client, seed, rng.randrange(1, length - 20)) if seed % 2 else stay(client, seed)
                for seed in range(count)
            ]
            await asyncio.gather(*work)
            await engine.wait_idle(1.0)

    asyncio.run(check())


@pytest.mark.parametrize("when", ["queued", "decoding"])
def test_disconnect_aborts_within_a_few_steps(model: Path, when: str) -> None:
    async def check() -> None:
        async with serving(model, partial(slow_executor, 0.1)) as (client, engine):
            call = client.generate(ids(1, sampling=sampling(max_tokens=1000, ignore_eos=True)))
            if when == "decoding":
                await anext(aiter(call))
            else:
                await asyncio.sleep(0.005)
            before = (await engine.status()).step
            call.cancel()  # type: ignore[attr-defined]
            await engine.wait_idle(1.0)
            assert (await engine.status()).step - before <= 4

    asyncio.run(check())


def test_deadline_ends_the_call_and_the_request(model: Path) -> None:
    async def check() -> None:
        async with serving(model, partial(slow_executor, 0.02)) as (client, engine):
            call = client.generate(ids(1, sampling=sampling(max_tokens=1000, ignore_eos=True)), timeout=0.3)
            assert (await status_of(call))[0] is Code.DEADLINE_EXCEEDED
            await engine.wait_idle(1.0)

    asyncio.run(check())


def test_abort_ends_the_stream_with_abort(model: Path) -> None:
    async def check() -> None:
        async with serving(model, partial(slow_executor, 0.01)) as (client, engine):
            request = ids(1, request_id="long", sampling=sampling(max_tokens=1000, seed=3, ignore_eos=True))
            chunks = []
            async for chunk in client.generate(request):
                chunks.append(chunk)
                if len(chunks) == 3:
                    await client.abort("long")
            assert chunks[-1].finish_reason == types_pb2.FINISH_REASON_ABORT
            got = tokens_of(chunks)
            assert chunks[-1].usage.completion_tokens == len(got) < 1000
            assert got == scripted(3, 1, len(got))
            await engine.wait_idle(1.0)
            with pytest.raises(grpc.aio.AioRpcError) as missing:
                await client.abort("long")
            assert missing.value.code() is Code.NOT_FOUND

    asyncio.run(check())


def test_a_live_request_id_is_taken_until_it_ends(model: Path) -> None:
    async def check() -> None:
        async with serving(model, partial(slow_executor, 0.01)) as (client, _):
            request = ids(1, request_id="one", sampling=sampling(max_tokens=50, ignore_eos=True))
            first = aiter(client.generate(request))
            await anext(first)
            assert (await status_of(client.generate(request)))[0] is Code.ALREADY_EXISTS  # type: ignore[arg-type]
            async for _ in first:
                pass
            assert await client.generate_all(request)

    asyncio.run(check())


def test_full_queues_answer_with_a_retry_hint(model: Path) -> None:
    """The gateway's own bound, then the engine's."""

    async def refused(client: object, request: Request) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.generate_all(request)  # type: ignore[attr-defined]
        return error.value

    async def check_bound(gateway_bound: int, engine_bound: int) -> None:
        request = ids(1, sampling=sampling(max_tokens=30, ignore_eos=True))
        async with (
            running_engine(partial(slow_executor, 0.01), max_queued_requests=engine_bound) as engine,
            running_gateway(model, [engine.client.address], max_queued_requests=gateway_bound) as gateway,
        ):
            client = gateway.client
            calls = [asyncio.create_task(client.generate_all(request)) for _ in range(80)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            errors = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
            assert errors and len(errors) < 80
            for error in errors:
                assert error.code() is Code.RESOURCE_EXHAUSTED
                assert error_code(error) == "rate_limit_exceeded"
                assert (retry_after_ms(error) or 0) > 0
            await engine.wait_idle(1.0)
            assert await client.generate_all(request)

    asyncio.run(check_bound(10, 1000))
    asyncio.run(check_bound(1000, 3))


def test_without_an_engine_the_gateway_says_so(model: Path) -> None:
    async def check() -> None:
        address = f"127.0.0.1:{free_port()}"
        async with running_gateway(model, [address], wait=False) as gateway:
            client = gateway.client
            while True:  # until the server itself listens
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await client.generate_all(ids(1))
                if error_code(error.value) is not None:
                    break
                await asyncio.sleep(0.02)
            assert error.value.code() is Code.UNAVAILABLE
            assert "ready" in (error.value.details() or "")
            assert (retry_after_ms(error.value) or 0) > 0
            assert not await client.is_serving()

    asyncio.run(check())


def test_requests_spread_over_engines_by_load(model: Path) -> None:
    async def check() -> None:
        async with (
            running_engine(partial(slow_executor, 0.01)) as first,
            running_engine(partial(slow_executor, 0.01)) as second,
            running_gateway(model, [first.client.address, second.client.address]) as gateway,
        ):
            while (await gateway.client.model_info()).engines < 2:
                await asyncio.sleep(0.01)
            request = ids(1, sampling=sampling(max_tokens=200, ignore_eos=True))
            calls = [asyncio.create_task(gateway.client.generate_all(request)) for _ in range(20)]
            await asyncio.gather(first.wait_running(10), second.wait_running(10))
            await asyncio.gather(*calls)

    asyncio.run(check())


def test_a_draining_engine_gets_no_more_and_finishes_what_it_has(model: Path) -> None:
    async def check() -> None:
        async with (
            running_engine(partial(slow_executor, 0.01)) as first,
            running_engine(partial(slow_executor, 0.01)) as second,
            running_gateway(model, [first.client.address, second.client.address]) as gateway,
        ):
            while (await gateway.client.model_info()).engines < 2:
                await asyncio.sleep(0.01)
            request = ids(1, sampling=sampling(max_tokens=150, seed=4, ignore_eos=True))
            calls = [asyncio.create_task(gateway.client.generate_all(request)) for _ in range(8)]
            await asyncio.gather(first.wait_running(4), second.wait_running(4))
            first.shutdown.request()
            while (await gateway.client.model_info()).engines == 2:
                await asyncio.sleep(0.005)
            later = [asyncio.create_task(gateway.client.generate_all(request)) for _ in range(8)]
            for chunks in await asyncio.gather(*calls, *later):
                assert tokens_of(chunks) == scripted(4, 1, 150)
            await asyncio.wait_for(first.task, 5)
            assert (await second.status()).load.running == 0

    asyncio.run(check())


def test_a_draining_gateway_finishes_its_streams_and_takes_no_more(model: Path) -> None:
    async def check() -> None:
        async with (
            running_engine(partial(slow_executor, 0.01)) as engine,
            running_gateway(model, [engine.client.address], drain_timeout_s=10.0) as gateway,
        ):
            client = gateway.client
            request = ids(1, sampling=sampling(max_tokens=150, seed=4, ignore_eos=True))
            calls = [asyncio.create_task(client.generate_all(request)) for _ in range(8)]
            await engine.wait_running(8)
            gateway.shutdown.request()
            while await client.is_serving():
                await asyncio.sleep(0.005)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await client.generate_all(request)
            assert (error.value.code(), error_code(error.value)) == (Code.UNAVAILABLE, "draining")
            for chunks in await asyncio.gather(*calls):
                assert tokens_of(chunks) == scripted(4, 1, 150)
            await asyncio.wait_for(gateway.task, 5.0)

    asyncio.run(check())
