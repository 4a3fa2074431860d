#!/usr/bin/env python3
"""A batch through the whole path, with simulated engines: lines per second, CPU of the server, and every
token checked. With --kills, the server is killed (SIGKILL) at random moments and started again.

    PYTHONPATH=.:kernels .venv/bin/python scripts/bench_batch.py --lines 10000 --tokens 20 --engines 2
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio

from chiron_engine.commands.simulated_engine import VOCABULARY_WITHOUT_TOKENIZER as VOCABULARY
from chiron_engine.core.simulated_tokens import SimulatedTokens
from chiron_engine.rpc.client import BatchClient, sampling
from chiron_engine.rpc.v1 import batch_pb2, inference_pb2

BATCH = "measured"
READY_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=20, help="output of each line")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--kills", type=int, default=0, help="of the server, while the batch runs")
    parser.add_argument("--kill-within", type=float, default=5.0, help="seconds from ready to kill, at most")
    parser.add_argument("--profile", default="h100/llama-3.1-8b/tp1/bf16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-batch-") as directory:
        return asyncio.run(measure(options, Path(directory)))


async def measure(options: argparse.Namespace, directory: Path) -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = start(options, directory, port)
    try:
        async with BatchClient(f"127.0.0.1:{port}") as client:
            await client.wait_serving(READY_S)
            before, idle_s = time.monotonic(), cpu_of(server.pid)
            await client.submit(batch_pb2.BatchSpec(batch_id=BATCH), batch_lines(options))
            submit_s, begun_s = time.monotonic() - before, cpu_of(server.pid)
            if options.kills:
                server = await kill_often(client, server, options, directory, port)
            batch = await wait_finished(client)
            ran_s = cpu_of(server.pid) - begun_s
            wrong = [line async for line in wrong_results(client, options)]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    seconds = batch.finished_at - batch.created
    lines, tokens = options.lines, options.lines * options.tokens
    print(f"{lines} lines of {options.tokens} tokens, {options.engines} engines; done: {batch.lines.done}")
    if not options.kills:
        submit_cpu_ms, cpu_ms = 1e3 * (begun_s - idle_s) / lines, 1e3 * ran_s / lines
        print(f"submission {submit_s:.2f} s, {submit_cpu_ms:.3f} ms of the server's CPU a line")
        rates = f"{lines / seconds:.0f} lines/s, {tokens / seconds:.0f} tokens/s"
        print(f"to the last result {seconds:.2f} s: {rates}")
        print(f"server's CPU meanwhile {cpu_ms:.3f} ms a line, {ran_s / seconds:.2f} cores")
    print(f"{len(wrong)} lines lost, doubled or wrong {wrong[:5] or ''}")
    return 1 if wrong else 0


async def kill_often(
    client: BatchClient,
    server: subprocess.Popen[bytes],
    options: argparse.Namespace,
    directory: Path,
    port: int,
) -> subprocess.Popen[bytes]:
    """The server that is left after the last kill."""
    chance = random.Random(options.seed)
    unfinished = 0
    for _ in range(options.kills):
        await asyncio.sleep(chance.uniform(0.0, options.kill_within))
        unfinished += not (await client.get(BATCH)).HasField("finished_at")
        server.kill()
        server.wait()
        server = start(options, directory, port)
        await client.wait_serving(READY_S)
    print(f"{options.kills} kills, {unfinished} of them before the end of the batch")
    return server


def start(options: argparse.Namespace, directory: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "chiron_engine", "serve", "anything", "--executor", "simulated"]
    command += ["--profile", options.profile, "--engines", str(options.engines)]
    command += ["--max-num-seqs", str(options.max_num_seqs), "--grpc-port", str(port)]
    log = (directory / "log").open("ab")
    return subprocess.Popen([*command, "--state-dir", str(directory / "state")], stdout=log, stderr=log)


def batch_lines(options: argparse.Namespace) -> Iterator[batch_pb2.BatchLine]:
    for number in range(options.lines):
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt(number)),
            sampling=sampling(temperature=0.0, max_tokens=options.tokens, seed=number, ignore_eos=True),
        )
        yield batch_pb2.BatchLine(custom_id=str(number), request=request)


def prompt(number: int) -> list[int]:
    return [5, number % VOCABULARY]


async def wait_finished(client: BatchClient) -> batch_pb2.BatchInfo:
    while True:
        try:
            batch = await client.get(BATCH)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        else:
            if batch.HasField("finished_at"):
                return batch
        await asyncio.sleep(0.1)


async def wrong_results(client: BatchClient, options: argparse.Namespace) -> AsyncIterator[int]:
    """Line numbers that have no result, or another one than an undisturbed run."""
    tokens = SimulatedTokens(VOCABULARY, VOCABULARY - 1, 1)
    next_line = 0
    async for result in client.results(BATCH):
        expected = tokens.output(prompt(result.line_no), result.line_no, options.tokens)
        if result.line_no != next_line or list(result.output.token_ids) != expected:
            yield result.line_no
        next_line = result.line_no + 1
    for line_no in range(next_line, options.lines):
        yield line_no


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has used, its children's not counted."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
