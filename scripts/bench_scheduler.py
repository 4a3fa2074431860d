#!/usr/bin/env python3
"""Time the scheduler alone: plan + commit per step, with an executor that computes nothing.

Two loads at the same number of running requests: steady decode, where nothing changes but block
growth, and churn, where a tenth of the requests end and as many begin in every step. Prints JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
from array import array
from collections.abc import Callable

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.null_executor import NullExecutor
from chiron_engine.core.requests import build_request
from chiron_engine.core.step_stats import StepStats, percentile
from chiron_engine.policy.iteration.sampling_params import SamplingParams

BLOCK_SIZE = 16
VOCAB = 32_000
PROMPT_TOKENS = 128
# 512k tokens of KV, about what an 80 GB device holds beside a model of 8B parameters in bfloat16.
DEVICE_BLOCKS = 32_768


class Bench:
    """An engine core over the null executor, fed by hand."""

    def __init__(self, running: int, changing: int, steps: int) -> None:
        tokens = PROMPT_TOKENS + 2 * steps + running
        self.shape = ExecutorShape(
            block_size=BLOCK_SIZE,
            num_device_blocks=DEVICE_BLOCKS,
            num_host_blocks=0,
            max_slots=running,
            max_step_tokens=running + (changing + 1) * PROMPT_TOKENS + 4096,
            max_model_len=tokens,
            vocab_size=VOCAB,
        )
        self.core = EngineCore(
            NullExecutor(self.shape), max_queued_requests=1 << 20, max_queued_tokens=1 << 40
        )
        self._random = random.Random(0)
        self._next_id = 0

    def add(self, max_tokens: int) -> None:
        prompt = array("I", (self._random.randrange(VOCAB) for _ in range(PROMPT_TOKENS)))
        request = build_request(
            self._next_id,
            prompt,
            SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
            shape=self.shape,
            eos_token_ids=(),
            draw_seed=lambda: 0,
            arrival=0.0,
        )
        self._next_id += 1
        self.core.add(request)


def measure(bench: Bench, steps: int, before_step: Callable[[], None]) -> dict[str, float]:
    """Microseconds of plan, commit and both over `steps` steps."""
    seen: list[StepStats] = []

    def keep(stats: StepStats) -> None:
        seen.append(stats)

    bench.core.add_step_hook(keep)
    gc.collect()
    for _ in range(steps):
        before_step()
        bench.core.step()
    both = [(s.plan_s + s.commit_s) * 1e6 for s in seen]
    return {
        "plan_us_p50": percentile([s.plan_s * 1e6 for s in seen], 50),
        "commit_us_p50": percentile([s.commit_s * 1e6 for s in seen], 50),
        "plan_commit_us_p50": percentile(both, 50),
        "plan_commit_us_p99": percentile(both, 99),
        "plan_commit_us_mean": sum(both) / len(both),
        "decode_requests_mean": sum(s.decode_requests for s in seen) / len(seen),
        "finished_per_step_mean": sum(s.finished for s in seen) / len(seen),
    }


def steady(running: int, steps: int) -> dict[str, float]:
    """Everybody decodes; nobody comes or goes."""
    bench = Bench(running, 0, steps)
    for _ in range(running):
        bench.add(max_tokens=steps + steps // 10 + running)
    while bench.core.load().waiting:
        bench.core.step()
    for _ in range(steps // 10):
        bench.core.step()
    return measure(bench, steps, lambda: None)


def churn(running: int, steps: int, share: float) -> dict[str, float]:
    """In every step about `share` of the running requests end and as many arrive."""
    changing = max(1, round(running * share))
    lifetime = max(2, round(running / changing))
    bench = Bench(running, changing, steps)

    def arrive() -> None:
        for _ in range(changing):
            bench.add(max_tokens=lifetime)

    for _ in range(3 * lifetime):
        arrive()
        bench.core.step()
    return measure(bench, steps, arrive)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--running", type=int, default=256, help="requests decoding at once")
    parser.add_argument("--steps", type=int, default=1000, help="steps to time of each load")
    parser.add_argument("--share", type=float, default=0.1, help="of the requests that change in a step")
    parser.add_argument("--json", default="-", metavar="FILE", help="where the JSON goes; - is stdout")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    result = {
        "running": arguments.running,
        "steps": arguments.steps,
        "share": arguments.share,
        "steady": steady(arguments.running, arguments.steps),
        "churn": churn(arguments.running, arguments.steps, arguments.share),
    }
    text = json.dumps(result, indent=2)
    if arguments.json == "-":
        print(text)
    else:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        print(f"wrote {arguments.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
