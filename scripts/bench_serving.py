#!/usr/bin/env python3
"""Start `chiron serve` and measure it as a client sees it, over gRPC.

Seconds from exec to ready; TTFT of a long prompt and of the same prompt again; throughput and
inter-token latency of many requests at once. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from chiron_engine.core.step_stats import percentile
from chiron_engine.rpc.client import InferenceClient, sampling
from chiron_engine.rpc.v1 import inference_pb2

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


@contextmanager
def serving(model: str, port: int, options: list[str]) -> Iterator[float]:
    """A server of its own, stopped at the end; yields the seconds from exec to ready."""
    command = [sys.executable, "-m", "chiron_engine", "serve", model, "--grpc-port", str(port), *options]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():  # its first line is the request to copy
            raise RuntimeError(f"the server ended with exit code {process.wait()} before it was ready")
        yield time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S)


def make_request(prompt: list[int], max_tokens: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
    )


async def run(client: InferenceClient, prompt: list[int], max_tokens: int) -> inference_pb2.GenerateChunk:
    """The last chunk of one request: its usage and timing."""
    return (await client.generate_all(make_request(prompt, max_tokens), timeout=START_TIMEOUT_S))[-1]


async def repeated_prompt(client: InferenceClient, prompts: list[list[int]]) -> dict[str, Any]:
    """TTFT of each prompt the first time and the second."""
    first, second = [], []
    for prompt in prompts:
        first.append((await run(client, prompt, 2)).timing.ttft_ms)
        second.append((await run(client, prompt, 2)).timing.ttft_ms)
    return {
        "prompt_tokens": len(prompts[0]),
        "ttft_ms": statistics.median(first),
        "ttft_again_ms": statistics.median(second),
        "ratio": statistics.median(a / b for a, b in zip(first, second, strict=True)),
    }


async def all_at_once(client: InferenceClient, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    last = await asyncio.gather(*(run(client, prompt, max_tokens) for prompt in prompts))
    wall_s = time.perf_counter() - started
    tokens = sum(chunk.usage.completion_tokens for chunk in last)
    return {
        "requests": len(prompts),
        "prompt_tokens": len(prompts[0]),
        "output_tokens": max_tokens,
        "output_tokens_per_s": tokens / wall_s,
        "ttft_ms_p50": percentile([c.timing.ttft_ms for c in last], 50),
        "ttft_ms_p99": percentile([c.timing.ttft_ms for c in last], 99),
        "mean_itl_ms_p50": percentile([c.timing.mean_itl_ms for c in last], 50),
    }


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    generator = random.Random(0)
    async with InferenceClient(f"127.0.0.1:{arguments.port}") as client:
        vocab = (await client.model_info(timeout=10.0)).vocab_size

        def prompts(count: int, tokens: int) -> list[list[int]]:
            return [[generator.randrange(vocab) for _ in range(tokens)] for _ in range(count)]

        first = await run(client, prompts(1, 16)[0], 2)
        return {
            "first_request_ttft_ms": first.timing.ttft_ms,
            "repeated_prompt": await repeated_prompt(client, prompts(5, arguments.long_prompt_tokens)),
            "all_at_once": await all_at_once(
                client, prompts(arguments.requests, arguments.prompt_tokens), arguments.output_tokens
            ),
        }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--port", type=int, default=50151)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--long-prompt-tokens", type=int, default=1000)
    parser.add_argument("--json", default="-", metavar="FILE", help="where the JSON goes; - is stdout")
    parser.add_argument("options", nargs="*", help="further options of `chiron serve`, after --")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with serving(arguments.model, arguments.port, arguments.options) as ready_s:
        result = {"model": arguments.model, "ready_s": ready_s, **asyncio.run(measure(arguments))}
    text = json.dumps(result, indent=2)
    if arguments.json == "-":
        print(text)
        return
    with open(arguments.json, "w", encoding="utf-8") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main()
