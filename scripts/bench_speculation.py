#!/usr/bin/env python3
"""Tokens per second with guesses over without, alternating in one run. Prints JSON.

Four loads: a prompt that asks for its own text again, alone; an open question, alone; and 8 and 32 of
those at once. The outputs of both ways are compared as well: in float32 they are equal but where two
logits lie within rounding, in bfloat16 the number of rows of a step shows more often.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from array import array
from contextlib import ExitStack
from dataclasses import replace

from chiron_engine.config import EngineConfig
from chiron_engine.core.clocks import Clock, MonotonicClock
from chiron_engine.core.core_settings import CoreSettings
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.policy.iteration.autoscaler_inputs import ItlTargets
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY
from chiron_engine.runtime.build import build_executor
from chiron_engine.runtime.torch_executor import TorchExecutor
from chiron_engine.runtime.trial_steps import measure_step_costs

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEXT = """def total(values):
    result = 0
    for value in values:
        result = result + value
    return result


def mean(values):
    if not values:
        raise ValueError("no values")
    return total(values) / len(values)


def variance(values):
    middle = mean(values)
    return mean([(value - middle) ** 2 for value in values])
"""
COPY = f"Repeat this code exactly, with nothing before it or after it:\n\n{TEXT}"
TOPICS = (
    "why the sky is blue", "how bread rises", "what a king does in chess", "how to grow tomatoes",
    "why ships float", "what makes a good story", "how a bicycle stays upright", "why leaves fall",
    "how glass is made", "what tides are", "how to learn a song", "why cats purr", "how maps are drawn",
    "what a bank does", "how rivers form", "why people dream", "how paper is made", "what a verb is",
    "how birds find their way", "why metal rusts", "how clocks work", "what honey is", "how fog forms",
    "why we laugh", "how a sail pulls", "what a symphony is", "how to store apples", "why stars twinkle",
    "how soap cleans", "what a glacier is", "how a lock works", "why onions sting",
)  # fmt: skip


class ProcessorClock(MonotonicClock):
    """Seconds of this process's threads: on a busy machine, with one thread, what a step takes alone."""

    def now(self) -> float:
        return time.process_time()


class Side:
    """One engine core, with guesses or without, over the executor both share."""

    def __init__(self, settings: CoreSettings, executor: TorchExecutor, clock: Clock) -> None:
        self.core: EngineCore = settings.build(executor, clock)
        self._now = clock.now
        self.rates: list[float] = []
        self.outputs: list[list[int]] = []
        self._step = 0

    def run(self, prompts: list[list[int]], max_tokens: int) -> None:
        """Serve all prompts at once; the rate counts from the first step in which all decode."""
        requests = [
            Request(number, array("I", prompt), GREEDY, max_tokens) for number, prompt in enumerate(prompts)
        ]
        core = self.core
        for request in requests:
            core.add(request)
        while not all(request.output_ids for request in requests):
            core.step()
        before = sum(len(request.output_ids) for request in requests)
        began = self._now()
        while core.has_work:
            core.step()
        seconds = self._now() - began
        self.rates.append((sum(len(request.output_ids) for request in requests) - before) / seconds)
        self.outputs = [list(request.output_ids) for request in requests]


def compare(
    executor: TorchExecutor, settings: tuple[CoreSettings, CoreSettings], prompts: list[list[int]],
    max_tokens: int, rounds: int, clock: Clock,
) -> dict[str, object]:  # fmt: skip
    """Alternates; a first round of each, in which the model of the step begins to be learned, counts too."""
    off, on = (Side(each, executor, clock) for each in settings)
    for number in range(rounds):
        for side in (off, on) if number % 2 else (on, off):
            side.run(prompts, max_tokens)
        print(f"round {number}: off {off.rates[-1]:.2f}, on {on.rates[-1]:.2f} tokens/s", file=sys.stderr)
    load = on.core.load()
    return {
        "requests": len(prompts),
        "prompt_tokens": sum(map(len, prompts)) // len(prompts),
        "off_tokens_per_s": statistics.median(off.rates),
        "on_tokens_per_s": statistics.median(on.rates),
        "ratio": statistics.median([a / b for a, b in zip(on.rates, off.rates, strict=True)]),
        "ratios": [round(a / b, 3) for a, b in zip(on.rates, off.rates, strict=True)],
        "drafted_tokens": load.drafted_tokens,
        "accepted_tokens": load.accepted_tokens,
        "equal_outputs": sum(a == b for a, b in zip(on.outputs, off.outputs, strict=True)),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--guesses", type=int, default=7, help="for one request in a step, at most")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=4, help="of each load and side")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--processor-time", action="store_true", help="with --threads 1, on a busy machine")
    parser.add_argument("--loads", nargs="*", default=["copy-1", "open-1", "open-8", "open-32"])
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from tokenizers import Tokenizer

    config = EngineConfig(
        arguments.model, dtype=arguments.dtype, max_num_seqs=32, max_model_len=2048, threads=arguments.threads
    )
    clock = ProcessorClock() if arguments.processor_time else MonotonicClock()
    with ExitStack() as resources:
        executor, spec = build_executor(config)
        resources.callback(executor.close)
        costs = measure_step_costs(executor)
        tokenizer = Tokenizer.from_file(str(spec.path / "tokenizer.json"))
        copied = [tokenizer.encode(CHAT.format(COPY)).ids]
        asked = [tokenizer.encode(CHAT.format(f"Explain {topic}.")).ids for topic in TOPICS]
        # Each core has its own books of the blocks they share: none may look for what it left there.
        off = CoreSettings(
            executor.shape, "fixed", ItlTargets(10.0, 10.0), costs, enable_prefix_caching=False
        )
        settings = (off, replace(off, num_speculative_tokens=arguments.guesses))
        loads = {"copy-1": copied, "open-1": asked[:1], "open-8": asked[:8], "open-32": asked}
        results = {}
        for name in arguments.loads:
            results[name] = compare(
                executor, settings, loads[name], arguments.max_tokens, arguments.rounds, clock
            )
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    print(json.dumps({"model": arguments.model, "dtype": arguments.dtype, "loads": results}, indent=2))


if __name__ == "__main__":
    main()
