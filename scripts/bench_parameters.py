#!/usr/bin/env python3
"""What the parameters of requests cost: decode steps of N requests that all have one, beside N plain ones.

    PYTHONPATH=.:kernels .venv/bin/python scripts/bench_parameters.py --requests 32

Each round runs every kind once, so that all see the same machine; the first round warms up. Prints JSON:
for each kind the median decode step and its ratio to the plain one's of the same round, median over rounds;
and on the CPU how much of it comes after the forward pass, which is what the parameters are about.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.requests import build_request
from chiron_engine.core.step_stats import StepStats
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.runtime.torch_environment import prepare_environment

if TYPE_CHECKING:
    from chiron_engine.model.loader import CausalLM
    from chiron_engine.runtime.torch_executor import TorchExecutor

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


@dataclass(frozen=True, slots=True)
class StepTime:
    """Milliseconds of a decode step, and those of them after its forward pass; medians."""

    whole: float
    after_forward: float


class TimedModel:
    """Notes when the forward pass ends. On a GPU it is only queued by then."""

    def __init__(self, model: CausalLM, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self.ended = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, *inputs: Any) -> Any:
        logits = self._model.forward(*inputs)
        self.ended = self._clock()
        return logits


def decode_step(
    executor: TorchExecutor,
    prompts: list[list[int]],
    params: SamplingParams,
    guide: object,
    clock: Callable[[], float],
) -> StepTime:
    """Of steps in which all requests decode and nothing else is done."""
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
    only_decodes: list[bool] = []

    def note(stats: StepStats) -> None:
        only_decodes.append(stats.decode_requests == len(prompts) and not stats.prefill_tokens)

    core.add_step_hook(note)
    plain_model = executor.model
    timed = executor.model = TimedModel(plain_model, clock)
    steps: list[tuple[float, float]] = []
    while core.has_work:
        began, seen = clock(), len(only_decodes)
        core.step()
        ended = clock()
        if any(only_decodes[seen:]):
            steps.append((ended - began, ended - timed.ended))
    executor.model = plain_model
    whole, after = zip(*steps, strict=True)
    return StepTime(1e3 * statistics.median(whole), 1e3 * statistics.median(after))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    config = EngineConfig(
        arguments.model,
        dtype=arguments.dtype,
        max_num_seqs=arguments.requests,
        swap_space=0,
        threads=1 if arguments.processor_time else None,
    )
    prepare_environment()
    from chiron_engine.runtime.build import build_executor
    from chiron_engine.runtime.guides import GuideCompiler

    clock = time.process_time if arguments.processor_time else time.perf_counter
    executor, spec = build_executor(config)
    compiler = GuideCompiler(spec.path, spec.vocab_size, spec.eos_token_ids)
    compile_ms: dict[str, float] = {}
    rounds: list[dict[str, StepTime]] = []
    for number in range(arguments.rounds + 1):
        generator = random.Random(number)
        prompts = [
            [generator.randrange(spec.vocab_size) for _ in range(arguments.prompt_tokens)]
            for _ in range(arguments.requests)
        ]
        seen: dict[str, StepTime] = {}
        for kind in arguments.kinds:
            fields = KINDS[kind]
            params = SamplingParams(**{"temperature": 0.0, "max_tokens": arguments.output_tokens, **fields})
            guide = None
            if params.guide is not None:
                began = time.perf_counter()
                guide = compiler.compile(params.guide)
                compile_ms.setdefault(kind, 1e3 * (time.perf_counter() - began))
            seen[kind] = decode_step(executor, prompts, params, guide, clock)
        rounds.append(seen)
    executor.close()
    return {"requests": arguments.requests, "compile_ms": compile_ms, "kinds": summary(rounds[1:])}


def summary(rounds: list[dict[str, StepTime]]) -> dict[str, dict[str, float]]:
    """added_share: what it takes after the forward pass more than a plain one does, of a plain step."""

    def middle(values: Iterable[float], digits: int) -> float:
        return round(statistics.median(values), digits)

    return {
        kind: {
            "decode_step_ms": middle((seen[kind].whole for seen in rounds), 2),
            "ratio": middle((seen[kind].whole / seen[PLAIN].whole for seen in rounds), 3),
            "after_forward_ms": middle((seen[kind].after_forward for seen in rounds), 2),
            "added_share": middle(
                (
                    (seen[kind].after_forward - seen[PLAIN].after_forward) / seen[PLAIN].whole
                    for seen in rounds
                ),
                3,
            ),
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
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of one thread of torch and those of the guides, for a machine that others use",
    )
    parser.add_argument("--rounds", type=int, default=3)
    print(json.dumps(measure(parser.parse_args()), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
