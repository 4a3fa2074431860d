"""A client that does not read costs a bounded buffer and then its request, nothing else."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import grpc
import grpc.aio
import pytest

from chiron_engine.rpc.client import sampling
from chiron_engine.rpc.errors import error_code
from chiron_engine.rpc.token_stream import MAX_PENDING_TOKENS, TokenStream
from chiron_engine.rpc.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from tests.gateway.serving_stack import SHAPE, null_executor, serving
from tests.gateway.tiny_model import write_tiny_model


def test_tokens_that_nobody_takes_end_the_request_at_the_bound() -> None:
    class Engine:
        aborted: ClassVar[list[int]] = []

        def abort(self, handle: int) -> None:
            self.aborted.append(handle)

        def abandon(self, handle: int) -> None: ...

        def take_back(self, handle: int) -> None: ...

    class Owner:
        def paused(self, stream: TokenStream) -> None: ...
        def ended(self, stream: TokenStream) -> None: ...

    stream = TokenStream([1], sampling(), types_pb2.Slo(), "a", Owner())
    stream.submission(Engine(), 7)
    for token in range(MAX_PENDING_TOKENS):
        stream.push(token, 0.0)
    assert not Engine.aborted
    for token in range(10):
        stream.push(token, 0.0)
    assert Engine.aborted == [7]
    assert stream.overflowed


LONG = replace(SHAPE, max_model_len=60_000, num_device_blocks=4096)
NARROW = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]


def test_a_client_that_reads_nothing_loses_its_request_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a channel with a narrow window, so that the server's writes soon block."""
    monkeypatch.setattr("chiron_engine.gateway.inference_service.WRITE_TIMEOUT_S", 0.5)
    model = write_tiny_model(tmp_path)
    endless = inference_pb2.GenerateRequest(
        text="h", sampling=sampling(max_tokens=50_000, seed=1, ignore_eos=True)
    )
    short = inference_pb2.GenerateRequest(text="i", sampling=sampling(max_tokens=20, seed=1, ignore_eos=True))

    async def check() -> None:
        async with (
            serving(model, lambda: null_executor(LONG)) as (client, engine),
            grpc.aio.insecure_channel(client.address, options=NARROW) as channel,
        ):
            unread = inference_pb2_grpc.InferenceStub(channel).Generate(endless)
            await asyncio.sleep(0.1)
            chunks = await client.generate_all(short)
            assert sum(len(chunk.token_ids) for chunk in chunks) == 20
            await engine.wait_idle(10.0)

            seen: list[int] = []
            with pytest.raises(grpc.aio.AioRpcError) as error:
                async with asyncio.timeout(10.0):
                    async for chunk in unread:
                        seen += chunk.token_ids
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error_code(error.value) == "slow_reader"
            first = (31 + ord("h") * 7 + 1) % SHAPE.vocab_size
            assert seen == [(first + 13 * index) % SHAPE.vocab_size for index in range(len(seen))]
            assert len(seen) < 50_000

    asyncio.run(check())
