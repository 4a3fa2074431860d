"""A client that does not read costs a bounded buffer and then its request, nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from chiron_engine.gateway.engine_link import EngineLink
from chiron_engine.gateway.generation import Generation, Prompt
from chiron_engine.gateway.text import ModelText
from chiron_engine.gateway.token_stream import MAX_PENDING_TOKENS, TokenStream
from chiron_engine.rpc.client import sampling
from chiron_engine.rpc.errors import RpcFailure
from chiron_engine.rpc.v1 import inference_pb2, types_pb2
from tests.gateway.serving_stack import running_engine, slow_executor
from tests.gateway.tiny_model import write_tiny_model


def test_tokens_that_nobody_takes_end_the_request_at_the_bound() -> None:
    aborted: list[TokenStream] = []
    stream = TokenStream(1, 1, aborted.append)
    for token in range(MAX_PENDING_TOKENS):
        stream.push(token, 0.0)
    assert not aborted
    for token in range(10):
        stream.push(token, 0.0)
    assert aborted == [stream]
    assert stream.overflowed


class UnreadContext:
    """A call whose peer takes `takes` messages and then nothing."""

    def __init__(self, takes: int) -> None:
        self.takes = takes

    async def write(self, chunk: inference_pb2.GenerateChunk) -> None:
        if self.takes == 0:
            await asyncio.Event().wait()
        self.takes -= 1


def test_a_blocked_write_ends_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiron_engine.gateway.generation.WRITE_TIMEOUT_S", 0.3)
    text = ModelText.from_directory(write_tiny_model(tmp_path))

    async def check() -> None:
        async with running_engine(lambda: slow_executor(0.005)) as engine:
            link = EngineLink(engine.client.address)
            link.start()
            while not link.is_ready:
                await asyncio.sleep(0.01)
            params = sampling(max_tokens=1000, ignore_eos=True)
            prompt = Prompt([1], params, types_pb2.Slo(), [])
            generation = Generation(prompt, "slow", 0.0, text, link)
            with pytest.raises(RpcFailure, match="read nothing") as failure:
                await generation.run(UnreadContext(2), lambda: None)  # type: ignore[arg-type]
            assert failure.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            generation.abort()
            await engine.wait_idle(1.0)
            await link.close()

    asyncio.run(check())
