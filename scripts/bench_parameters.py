#!/usr/bin/env python3
"""What the parameters of requests cost: decode steps of N requests that all have one, beside N plain ones.

    PYTHONPATH=.:kernels .venv/bin/python scripts/bench_parameters.py --requests 32

Each round runs every kind once, so that all see the same machine; the first round warms up. Prints JSON:
for each kind the median decode step and its ratio to the plain one's of the same round, median over rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import Executor
from chiron_engine.core.requests import build_request
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.runtime.torch_environment import prepare_environment

PLAIN = "plain"
# Longer than any run: no output ends early.
SCHEMA = json.dumps(
    {
        "type": "array",
        "minItems": 500,
        "items": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        },
    }
)
KINDS: dict[str, dict[str, Any]] = {
    PLAIN: {"ignore_eos": True},
    "sampled": {"ignore_eos": True, "temperature": 0.8, "top_p": 0.95},
    "min_p": {"ignore_eos": True, "temperature": 0.8, "min_p": 0.05},
    "penalties": {
        "ignore_eos": True,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
    },
    "logit_bias": {"ignore_eos": True, "logit_bias": {token: -1.0 for token in range(100, 400)}},
    "logprobs": {"ignore_eos": True, "logprobs": 5},
    "json_schema": {"json_schema": SCHEMA},
    "regex": {"regex": "([a-z]+ )+"},
    "counted_regex": {"regex": "([a-z]{2,8} ){500}"},
}


def decode_step_ms(
    executor: Executor, prompts: list[list[int]], params: SamplingParams, guide: object
) -> float:
    """The median step in which all requests decode and nothing else is done."""
    core = EngineCore(executor, max_queued_requests=len(prompts) + 1, max_queued_tokens=1 << 40)
    for number, prompt in enumerate(prompts):
        core.add(
            build_request(
                number,
                prompt,
                params,
                shape=core.shape,
                eos_token_ids=(),
                draw_seed=lambda number=number: number,
                arrival=core.clock.now(),
                guide=guide,
            )
        )
    steps: list[float] = []
    core.add_step_hook(
        lambda stats: (
            steps.append(stats.device_s)
            if stats.decode_requests == len(prompts) and not stats.prefill_tokens
            else None
        )
    )
    while core.has_work:
        core.step()
    return 1e3 * statistics.median(steps)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    config = EngineConfig(
        arguments.model, dtype=arguments.dtype, max_num_seqs=arguments.requests, swap_space=0
    )
    prepare_environment()
    from chiron_engine.runtime.build import build_executor
    from chiron_engine.runtime.guides import GuideCompiler

    executor, spec = build_executor(config)
    compiler = GuideCompiler(spec.path, spec.vocab_size, spec.eos_token_ids)
    compile_ms: dict[str, float] = {}
    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds + 1):
        generator = random.Random(number)
        prompts = [
            [generator.randrange(spec.vocab_size) for _ in range(arguments.prompt_tokens)]
            for _ in range(arguments.requests)
        ]
        seen: dict[str, float] = {}
        for kind in arguments.kinds:
            fields = KINDS[kind]
            params = SamplingParams(**{"temperature": 0.0, "max_tokens": arguments.output_tokens, **fields})
            guide = None
            if params.guide is not None:
                began = time.perf_counter()
                guide = compiler.compile(params.guide)
                compile_ms.setdefault(kind, 1e3 * (time.perf_counter() - began))
            seen[kind] = decode_step_ms(executor, prompts, params, guide)
        rounds.append(seen)
    executor.close()
    return {"requests": arguments.requests, "compile_ms": compile_ms, "kinds": summary(rounds[1:])}


def summary(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        kind: {
            "decode_step_ms": round(statistics.median(seen[kind] for seen in rounds), 2),
            "ratio": round(statistics.median(seen[kind] / seen[PLAIN] for seen in rounds), 3),
        }
        for kind in rounds[0]
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="plain is needed")
    parser.add_argument("--rounds", type=int, default=3)
    print(json.dumps(measure(parser.parse_args()), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
