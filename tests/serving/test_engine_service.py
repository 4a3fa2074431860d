"""The Connect stream, without a gateway in front of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

import grpc
import grpc.aio
import pytest

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.null_executor import NullExecutor
from chiron_engine.policy.iteration.request import Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import Guide, SamplingParams
from chiron_engine.rpc.client import sampling
from chiron_engine.rpc.errors import RpcFailure
from chiron_engine.rpc.v1 import engine_pb2, types_pb2
from chiron_engine.serving import engine_service, engine_stream
from chiron_engine.serving.engine_loop import EngineLoop
from chiron_engine.serving.engine_service import EngineService
from tests.gateway.serving_stack import DESCRIPTION, SHAPE, running_engine, slow_executor

LONG_S = 10.0


def submit(handle: int, max_tokens: int = 5, **fields: object) -> engine_pb2.Submit:
    params = sampling(max_tokens=max_tokens, seed=handle, ignore_eos=True)
    return engine_pb2.Submit(handle=handle, prompt_token_ids=[handle], sampling=params, **fields)  # type: ignore[arg-type]


async def read_until(
    connection: grpc.aio.StreamStreamCall, is_enough: Callable[[list[engine_pb2.StepOutput]], bool]
) -> list[engine_pb2.StepOutput]:
    outputs: list[engine_pb2.StepOutput] = []
    while not is_enough(outputs):
        outputs.append((await connection.read()).output)
    return outputs


def ended(count: int) -> Callable[[list[engine_pb2.StepOutput]], bool]:
    return lambda outputs: sum(len(output.finished) for output in outputs) >= count


def test_hello_tells_what_a_gateway_needs() -> None:
    async def check() -> None:
        async with running_engine() as engine:
            hello = (await engine.client.connect().read()).hello
            assert hello.boot_id == (await engine.status()).boot_id
            assert (hello.model, hello.architecture, hello.dtype) == ("tiny", "NoModel", "float32")
            assert list(hello.eos_token_ids) == list(DESCRIPTION.eos_token_ids)
            assert (hello.vocab_size, hello.max_model_len) == (SHAPE.vocab_size, SHAPE.max_model_len)
            assert (hello.block_size, hello.max_num_seqs) == (SHAPE.block_size, SHAPE.max_slots)
            assert hello.load.free_blocks == hello.load.total_blocks == SHAPE.num_device_blocks

    asyncio.run(check())


def test_one_message_a_step_for_all_requests_of_a_stream() -> None:
    async def check() -> None:
        async with running_engine(partial(slow_executor, 0.02)) as engine:
            connection = engine.client.connect()
            await connection.read()
            await connection.write(engine_pb2.EngineCommand(submits=[submit(h, 10) for h in range(1, 33)]))
            outputs = await read_until(connection, ended(32))
            assert len(outputs) <= 12
            for handle in range(1, 33):
                pairs = [pair for o in outputs for pair in zip(o.handles, o.token_ids, strict=True)]
                tokens = [token for owner, token in pairs if owner == handle]
                assert tokens == [(handle * 38 + i * 13 + 1) % SHAPE.vocab_size for i in range(10)]
            assert outputs[-1].load.running == 0

    asyncio.run(check())


def test_streams_see_their_own_requests_only_and_closing_one_aborts_them() -> None:
    async def check() -> None:
        async with running_engine(partial(slow_executor, 0.01)) as engine:
            first, second = engine.client.connect(), engine.client.connect()
            await first.read()
            await second.read()
            await first.write(engine_pb2.EngineCommand(submits=[submit(h, 1000) for h in (1, 2)]))
            await second.write(engine_pb2.EngineCommand(submits=[submit(h, 40) for h in (2, 3)]))
            await read_until(first, lambda outputs: len(outputs) >= 3)
            await first.done_writing()
            outputs = await read_until(second, ended(2))
            assert {handle for output in outputs for handle in output.handles} == {2, 3}
            assert all(
                f.reason == types_pb2.FINISH_REASON_LENGTH for output in outputs for f in output.finished
            )
            await engine.wait_idle(1.0)

    asyncio.run(check())


def test_abort_by_handle() -> None:
    async def check() -> None:
        async with running_engine(partial(slow_executor, 0.01)) as engine:
            connection = engine.client.connect()
            await connection.read()
            await connection.write(engine_pb2.EngineCommand(submits=[submit(1, 1000), submit(2, 30)]))
            await connection.write(engine_pb2.EngineCommand(aborts=[1, 99]))
            outputs = await read_until(connection, ended(2))
            reasons = {f.handle: f.reason for output in outputs for f in output.finished}
            assert reasons == {1: types_pb2.FINISH_REASON_ABORT, 2: types_pb2.FINISH_REASON_LENGTH}

    asyncio.run(check())


def test_a_handle_in_use_ends_the_stream() -> None:
    async def check() -> None:
        async with running_engine(partial(slow_executor, 0.01)) as engine:
            connection = engine.client.connect()
            await connection.read()
            await connection.write(engine_pb2.EngineCommand(submits=[submit(1, 1000), submit(1, 1000)]))
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await read_until(connection, lambda outputs: False)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.value.details() == "handle 1 is in use on this stream"
            await engine.wait_idle(1.0)

    asyncio.run(check())


class UnreadContext:
    """A call whose peer reads the first message and nothing more until `released`."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.writes = 0

    async def write(self, event: engine_pb2.EngineEvent) -> None:
        self.writes += 1
        if self.writes > 1:
            await self.released.wait()


async def commands(*submits: engine_pb2.Submit) -> AsyncIterator[engine_pb2.EngineCommand]:
    yield engine_pb2.EngineCommand(submits=submits)
    await asyncio.Event().wait()


def serve_directly(submits: list[engine_pb2.Submit], requests: list[Request]) -> None:
    """Run one Connect call against an unread context to its end: the requests end first, then the
    peer reads again. Collects the requests."""

    async def run() -> None:
        context = UnreadContext()
        loop = EngineLoop(EngineCore(NullExecutor(SHAPE)))
        service = EngineService()
        service.attach(loop, DESCRIPTION)
        loop.subscribe(lambda output: requests.extend(output.step.finished))
        loop.start()
        try:
            call = asyncio.create_task(
                service.Connect(commands(*submits), context)  # type: ignore[arg-type]
            )
            async with asyncio.timeout(LONG_S):
                while len(requests) < len(submits):
                    await asyncio.sleep(0.01)
            assert context.writes == 2
            context.released.set()
            await asyncio.wait_for(call, LONG_S)
        finally:
            loop.stop()
            await asyncio.wrap_future(loop.ended)

    asyncio.run(run())


def test_a_gateway_that_does_not_read_is_cut_off_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_stream, "MAX_PENDING_TOKENS", 2000)
    seen: list[Request] = []
    with pytest.raises(RpcFailure, match="read too slowly") as failure:
        serve_directly([submit(handle, 1000) for handle in range(1, 10)], seen)
    assert failure.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_sampling_and_slo_reach_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_stream, "MAX_PENDING_TOKENS", 20)
    slo = types_pb2.Slo(slo_class=types_pb2.SLO_CLASS_BATCH, itl_slo_ms=500.0, deadline_s=60.0)
    params = sampling(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        seed=3,
        max_tokens=9,
        stop_token_ids=[4],
        ignore_eos=True,
        min_p=0.1,
        min_tokens=2,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={3: 1.5},
    )
    full = engine_pb2.Submit(handle=1, prompt_token_ids=[5, 6], sampling=params, slo=slo, prior_outputs=1)
    plain = engine_pb2.Submit(handle=2, prompt_token_ids=[5], sampling=sampling(max_tokens=3))
    seen: list[Request] = []
    with pytest.raises(RpcFailure):
        serve_directly([full, plain, submit(3, 1000)], seen)
    first, second = sorted(seen, key=lambda request: request.request_id)[:2]
    assert first.sampling == SamplingParams(0.5, 7, 0.9, 3, 9, (4,), True, 0.1, 2, 1.5, 0.25, -0.5, {3: 1.5})
    assert (first.num_prior_outputs, second.num_prior_outputs) == (1, 0)
    assert (first.slo.slo_class, first.slo.ttft_s, first.slo.itl_s) == (SloClass.BATCH, 3600.0, 0.5)
    assert first.slo.deadline is not None
    assert first.slo.deadline - first.arrival == pytest.approx(60.0)
    assert first.stop_ids == {4} and first.seed == 3
    assert second.sampling == SamplingParams(max_tokens=3)
    assert second.slo == Slo()
    assert second.stop_ids == set(DESCRIPTION.eos_token_ids)


def test_a_request_that_gave_way_elsewhere_brings_its_count() -> None:
    async def check() -> None:
        async with running_engine() as engine:
            connection = engine.client.connect()
            await connection.read()
            slo = types_pb2.Slo(slo_class=types_pb2.SLO_CLASS_BATCH)
            await connection.write(engine_pb2.EngineCommand(submits=[submit(1, slo=slo, evictions=2)]))
            outputs = await read_until(connection, ended(1))
            assert outputs[-1].finished[0].preemptions == 2

    asyncio.run(check())


def guided(handle: int, regex: str) -> engine_pb2.Submit:
    params = sampling(max_tokens=5, seed=handle, regex=regex)
    return engine_pb2.Submit(handle=handle, prompt_token_ids=[handle], sampling=params)


def slow_compiler(guide: Guide) -> object:
    """A made-up one: nothing here follows what it makes."""
    if guide.text == "wrong":
        raise ValueError("regex cannot be followed: it is wrong")
    time.sleep(1.0 if guide.text == "slow" else 0.0)
    return object()


def test_a_guide_that_is_being_compiled_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_service, "COMPILE_S", 0.5)

    async def check() -> None:
        async with running_engine(compile_guide=slow_compiler) as engine:
            connection = engine.client.connect()
            await connection.read()
            submits = [guided(1, "slow"), guided(2, "slow"), guided(3, "wrong"), guided(4, "a"), submit(5)]
            await connection.write(engine_pb2.EngineCommand(submits=submits))
            await connection.write(engine_pb2.EngineCommand(aborts=[1]))
            outputs = await read_until(
                connection, lambda outputs: ended(3)(outputs) and sum(len(o.rejected) for o in outputs) >= 2
            )
            reasons = {f.handle: f.reason for output in outputs for f in output.finished}
            assert reasons == {
                1: types_pb2.FINISH_REASON_ABORT,
                4: types_pb2.FINISH_REASON_LENGTH,
                5: types_pb2.FINISH_REASON_LENGTH,
            }
            rejected = [r for output in outputs for r in output.rejected]
            assert [r.handle for r in rejected] == [3, 2]
            assert {r.code for r in rejected} == {grpc.StatusCode.INVALID_ARGUMENT.value[0]}
            assert "it is wrong" in rejected[0].message
            assert "not compiled within 0.5 s" in rejected[1].message
            await engine.wait_idle()

    asyncio.run(check())


def test_without_a_compiler_a_guide_is_refused() -> None:
    async def check() -> None:
        async with running_engine() as engine:
            connection = engine.client.connect()
            await connection.read()
            await connection.write(engine_pb2.EngineCommand(submits=[guided(1, "a")]))
            outputs = await read_until(connection, lambda outputs: any(o.rejected for o in outputs))
            assert "no tokenizer to follow a regex" in outputs[-1].rejected[0].message

    asyncio.run(check())
