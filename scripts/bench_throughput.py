#!/usr/bin/env python3
"""Offline throughput: N requests of random prompt ids at once, through the engine core in process.

Prints JSON: output tokens/s, TTFT percentiles, step times and the share of time spent outside the
executor. `--peer vllm` runs vLLM's CPU build on the same load in a virtual environment of its own,
taking turns with the engine, and adds the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.requests import build_request
from chiron_engine.core.step_stats import StepStats, percentile
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.runtime.torch_environment import prepare_environment

if TYPE_CHECKING:
    from chiron_engine.runtime.torch_executor import TorchExecutor
    from scripts.cpu_peers.worker import Worker


@dataclass(slots=True)
class Run:
    """One pass over the load. Times in seconds unless named otherwise."""

    wall_s: float
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_s_p50: float
    ttft_s_p99: float
    steps: int
    step_ms_p50: float
    step_ms_p99: float
    decode_step_ms_p50: float
    outside_executor_share: float
    outside_executor_share_decode: float


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def run_once(executor: TorchExecutor, prompts: list[list[int]], output_tokens: int) -> Run:
    """All requests at once, greedy, ends of sequence ignored, on a fresh core (an empty cache)."""
    core = offline_core(executor, len(prompts))
    steps: list[StepStats] = []
    core.add_step_hook(lambda stats: steps.append(stats))
    start = core.clock.now()
    requests = submit(core, prompts, output_tokens)
    step_s: list[float] = []
    while core.has_work:
        began = time.perf_counter()
        core.step()
        step_s.append(time.perf_counter() - began)
    wall_s = core.clock.now() - start
    return summarise(requests, steps, step_s, wall_s)


def offline_core(executor: TorchExecutor, requests: int) -> EngineCore:
    """A fresh core with room for so many requests, and no local autoscaler to hold its batch down."""
    return EngineCore(executor, max_queued_requests=requests + 1, max_queued_tokens=1 << 40)


def submit(core: EngineCore, prompts: list[list[int]], output_tokens: int) -> list[Request]:
    """All requests at once, greedy, ends of sequence ignored."""
    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    start = core.clock.now()
    requests: list[Request] = []
    for number, prompt in enumerate(prompts):
        request = build_request(
            number, prompt, sampling, shape=core.shape, eos_token_ids=(), draw_seed=lambda: 0, arrival=start
        )
        core.add(request)
        requests.append(request)
    return requests


def summarise(requests: list[Request], steps: list[StepStats], step_s: list[float], wall_s: float) -> Run:
    produced = sum(len(r.output_ids) for r in requests)
    prompts = sum(len(r.prompt_ids) for r in requests)
    ttft = [r.first_token - r.arrival for r in requests if r.first_token is not None]
    # With a pipeline the first call of core.step starts two steps, so the lists differ in length by
    # at most one; shares are of sums.
    pairs = list(zip(steps, step_s, strict=False))
    decodes = [
        (stats, seconds) for stats, seconds in pairs if stats.decode_requests and not stats.prefill_tokens
    ]
    return Run(
        wall_s=wall_s,
        output_tokens=produced,
        output_tokens_per_s=produced / wall_s,
        total_tokens_per_s=(produced + prompts) / wall_s,
        ttft_s_p50=percentile(ttft, 50),
        ttft_s_p99=percentile(ttft, 99),
        steps=len(steps),
        step_ms_p50=percentile(step_s, 50) * 1e3,
        step_ms_p99=percentile(step_s, 99) * 1e3,
        decode_step_ms_p50=percentile([seconds for _, seconds in decodes], 50) * 1e3,
        outside_executor_share=outside_share(pairs),
        outside_executor_share_decode=outside_share(decodes),
    )


def outside_share(pairs: list[tuple[StepStats, float]]) -> float:
    """Share of the step time that was neither handing a plan to the executor nor waiting for it."""
    total = sum(seconds for _, seconds in pairs)
    inside = sum(stats.submit_s + stats.wait_s for stats, _ in pairs)
    return 1.0 - inside / total if total else float("nan")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    config = EngineConfig(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        max_num_seqs=min(arguments.requests, arguments.max_num_seqs),
        max_num_batched_tokens=max(arguments.max_num_batched_tokens, arguments.requests),
        threads=arguments.threads,
        swap_space=0,
    )
    prepare_environment()
    started = time.perf_counter()
    from chiron_engine.runtime.build import build_executor  # loads torch, which is part of getting ready

    executor, spec = build_executor(config)
    ready_s = time.perf_counter() - started
    peer = start_peer(arguments)
    runs, peer_rates = [], []
    try:
        for repeat in range(arguments.repeat + 1):
            prompts = random_prompts(
                arguments.requests, arguments.prompt_tokens, spec.vocab_size, seed=repeat
            )
            runs.append(run_once(executor, prompts, arguments.output_tokens))
            if peer is not None:
                peer_rates.append(peer.run(prompts, arguments.output_tokens).output_tokens_per_s)
    finally:
        if peer is not None:
            peer.close()
    # The first pass of either side warmed it up.
    runs, peer_rates = runs[1:], peer_rates[1:]
    best = statistics.median(run.output_tokens_per_s for run in runs)
    result: dict[str, Any] = {
        "model": spec.name,
        "dtype": executor.model.precision.name,
        "device": str(executor.device),
        "requests": arguments.requests,
        "prompt_tokens": arguments.prompt_tokens,
        "output_tokens": arguments.output_tokens,
        "ready_s": ready_s,
        "output_tokens_per_s": best,
        "runs": [asdict(run) for run in runs],
    }
    if peer is not None:
        peer_best = statistics.median(peer_rates)
        result["peer"] = {
            "name": arguments.peer,
            "version": peer.versions["vllm"],
            "output_tokens_per_s": peer_best,
            "runs_output_tokens_per_s": peer_rates,
            "ratio": best / peer_best,
        }
    executor.close()
    return result


def start_peer(arguments: argparse.Namespace) -> Worker | None:
    if arguments.peer is None:
        return None
    from scripts.cpu_peers.peers import PEERS, Load

    load = Load(
        model=arguments.model,
        threads=arguments.threads or len(os.sched_getaffinity(0)),
        max_num_seqs=arguments.requests,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        tokens_per_request=arguments.prompt_tokens + arguments.output_tokens,
    )
    peer = PEERS[arguments.peer]
    settings = peer.settings(load, {"dtype": arguments.peer_dtype})
    worker = peer.worker(arguments.peer)
    try:
        worker.start(settings)
    except BaseException:
        worker.close()
        raise
    return worker


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="compute threads; all cores if not given")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=1, help="timed passes, after one to warm up")
    parser.add_argument("--peer", choices=["vllm"], help="measure this engine too, taking turns")
    parser.add_argument("--peer-dtype", default="bfloat16", help="the dtype the peer runs in")
    parser.add_argument("--json", default="-", metavar="FILE", help="where the JSON goes; - is stdout")
    arguments = parser.parse_args()
    for name in ("requests", "prompt_tokens", "output_tokens", "repeat"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    # So that the peer is ended, with its children; stopped ones would stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    text = json.dumps(measure(arguments), indent=2)
    if arguments.json == "-":
        print(text)
        return
    with open(arguments.json, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    print(f"wrote {arguments.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
