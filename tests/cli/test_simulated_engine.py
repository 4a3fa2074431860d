"""`--executor simulated` as real processes: no torch, the profile's step times, tokens that repeat."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest

from chiron_engine.rpc.client import InferenceClient, sampling
from chiron_engine.rpc.v1 import inference_pb2, types_pb2
from chiron_engine.sim.profiles import load_profile
from tests.cli.chiron_process import Server, chiron, wait_gone

PROFILE = "h100/llama-3.1-8b/tp1/bf16"
SIMULATED = ["--executor", "simulated", "--profile", PROFILE, "--grpc-port", "0"]
SCALE = 4.0


def address_in(line: str) -> str:
    found = re.search(r"[\w.]+:\d+", line)
    assert found is not None, line
    return found[0]


def generate(
    address: str, prompt: list[int], max_tokens: int | None, *, ends: bool = False, seed: int = 1
) -> tuple[list[int], inference_pb2.GenerateChunk]:
    """Tokens, and the last chunk."""
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=sampling(max_tokens=max_tokens, seed=seed, ignore_eos=not ends),
    )

    async def ask() -> list[inference_pb2.GenerateChunk]:
        async with InferenceClient(address) as client:
            return await client.generate_all(request, timeout=60)

    chunks = asyncio.run(ask())
    return [token for chunk in chunks for token in chunk.token_ids], chunks[-1]


def libraries_of(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_an_engine_keeps_the_pace_of_its_profile_and_repeats_its_tokens() -> None:
    """Also: no torch in it, text refused, one end, a clean stop."""
    with Server(["engine", "anything", *SIMULATED, "--time-scale", str(SCALE)]) as server:
        address = address_in(server.wait_ready())
        assert "libtorch" not in libraries_of(server.process.pid)

        count = 40
        began = time.monotonic()
        tokens, last = generate(address, [5, 6, 7], count)
        taken = time.monotonic() - began
        assert (len(tokens), last.finish_reason) == (count, types_pb2.FINISH_REASON_LENGTH)
        step_s = load_profile(PROFILE).step_times.seconds(1, 20, 0, 0) * SCALE
        assert last.timing.mean_itl_ms == pytest.approx(step_s * 1e3, rel=0.15)
        assert count * step_s * 0.95 < taken < count * step_s * 2 + 1

        rest, _ = generate(address, [5, 6, 7, *tokens[:15]], count - 15)
        assert tokens[15:] == rest
        again, last = generate(address, [5, 6, 7], 2000, ends=True, seed=3)
        assert last.finish_reason == types_pb2.FINISH_REASON_STOP
        repeated, _ = generate(address, [5, 6, 7, *again[:-3]], 2000, ends=True, seed=3)
        assert repeated == again[-3:]

        async def ask_with_text() -> None:
            async with InferenceClient(address) as client:
                await client.generate_all(inference_pb2.GenerateRequest(text="hello"), timeout=10)

        with pytest.raises(grpc.aio.AioRpcError, match="send token_ids") as error:
            asyncio.run(ask_with_text())
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT

        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_serve_starts_them_and_text_works_with_a_tokenizer(tiny_llama: Path) -> None:
    with Server(["serve", str(tiny_llama), "--engines", "2", *SIMULATED, "--max-num-seqs", "64"]) as server:
        address = address_in(server.wait_ready())
        engines = server.engine_pids()
        assert len(engines) == 2
        assert not any("libtorch" in libraries_of(pid) for pid in engines)
        options = ["--max-tokens", "6", "--ignore-eos", "--seed", "1", "--json", "hello"]
        first = json.loads(chiron("generate", "--server", address, *options).stdout)
        assert len(first["token_ids"]) == 6
        assert json.loads(chiron("generate", "--server", address, *options).stdout)["text"] == first["text"]
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert wait_gone(engines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "b200/nothing"], rf"no profile 'b200/nothing'.*\n? *.*{PROFILE}"),
        ([], "needs a profile"),
        (["--profile", PROFILE, "--time-scale", "0"], "time_scale is 0.0"),
        (["--profile", PROFILE, "--dtype", "float32"], "dtype does not apply"),
        (["--profile", PROFILE, "--disable-cascade-attn"], "disable_cascade_attn does not apply"),
        (["--profile", PROFILE, "--kv-cache-dtype", "fp8"], "kv_cache_dtype does not apply"),
        (["--profile", PROFILE, "--enforce-eager"], "enforce_eager does not apply"),
        (["--profile", PROFILE, "--kernels", "torch"], "kernels does not apply"),
        (["--profile", PROFILE, "--max-num-seqs", "513"], "goes to 512"),
        (["--profile", PROFILE, "--max-num-batched-tokens", "8"], "room for a token of every request"),
        (["--profile", PROFILE, "--max-model-len", "200000"], "goes to 131072"),
        (["--profile", PROFILE, "--kv-cache-memory", "1KiB"], "room for one block"),
    ],
)
def test_what_a_profile_cannot_do_is_a_usage_error(options: list[str], message: str) -> None:
    ended = chiron("engine", "anything", "--executor", "simulated", "--grpc-port", "0", *options)
    assert ended.returncode == 2
    assert re.search(message, ended.stderr, re.DOTALL), ended.stderr
    assert not ended.stdout


def test_a_profile_without_the_simulated_executor_is_refused() -> None:
    ended = chiron("engine", "anything", "--profile", PROFILE)
    assert ended.returncode == 2
    assert "--executor simulated" in ended.stderr
