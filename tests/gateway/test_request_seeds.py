"""Seeds of requests that bring none are drawn where they come in, so that another engine can go on."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import grpc
import grpc.aio
import pytest

from chiron_engine.gateway.engine_pool import EnginePool
from chiron_engine.gateway.no_tokenizer import NoTokenizer
from chiron_engine.gateway.server import Gateway
from chiron_engine.gateway.text import ModelText
from chiron_engine.rpc.client import InferenceClient, chat, sampling
from chiron_engine.rpc.port import bind
from chiron_engine.rpc.server import Health, create_server
from chiron_engine.rpc.v1 import inference_pb2
from tests.gateway.serving_stack import SHAPE, running_engine
from tests.gateway.tiny_model import write_tiny_model

Request = inference_pb2.GenerateRequest
IDS = inference_pb2.TokenIds(ids=[3])


def scripted(seed: int, count: int) -> list[int]:
    """The null executor's output for the prompt [3]."""
    return [(seed * 31 + 21 + index * 13 + 1) % SHAPE.vocab_size for index in range(count)]


async def with_gateway(text: ModelText, requests: list[Request], seed: int = 0) -> list[list[int]]:
    """Tokens of the requests, one after another, through a gateway of this seed."""
    async with running_engine() as engine:
        server = create_server()
        gateway = Gateway(text, "tiny", EnginePool([engine.client.address]), seed=seed)
        gateway.add_to(server)
        port = bind(server, "127.0.0.1", 0)
        await server.start()
        gateway.start(Health(server))
        await gateway.wait_ready()
        try:
            async with InferenceClient(f"127.0.0.1:{port}") as client:
                answers = [await client.generate_all(request) for request in requests]
        finally:
            await gateway.close()
            await server.stop(0)
        return [[token for chunk in answer for token in chunk.token_ids] for answer in answers]


def test_the_gateway_draws_the_seeds(tmp_path: Path) -> None:
    text = ModelText.from_directory(write_tiny_model(tmp_path / "model"))
    unseeded = Request(token_ids=IDS, sampling=sampling(max_tokens=3, ignore_eos=True))
    seeded = Request(token_ids=IDS, sampling=sampling(max_tokens=3, ignore_eos=True, seed=0))
    got = asyncio.run(with_gateway(text, [unseeded, seeded, unseeded], seed=5))
    drawn = random.Random(5)
    assert got == [scripted(seed, 3) for seed in (drawn.getrandbits(64), 0, drawn.getrandbits(64))]


def test_without_a_tokenizer_ids_pass_and_text_is_refused() -> None:
    params = sampling(max_tokens=3, ignore_eos=True, seed=1)
    assert asyncio.run(with_gateway(NoTokenizer(), [Request(token_ids=IDS, sampling=params)])) == [
        scripted(1, 3)
    ]
    for request, message in (
        (Request(text="hello", sampling=params), "send token_ids"),
        (Request(chat=chat([("user", "hello")]), sampling=params), "send token_ids"),
        (Request(token_ids=IDS, stop=["x"], sampling=params), "use stop_token_ids"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=message) as error:
            asyncio.run(with_gateway(NoTokenizer(), [request]))
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
