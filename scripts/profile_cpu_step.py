#!/usr/bin/env python3
"""Where a step's time goes on the CPU, by operator: decodes of 1, 8, 32 and 64 rows after 160 tokens each,
and a prompt step of four times 128 tokens. Prints JSON: milliseconds a step, the median of its repeats.

What is not an operator is `rest`: the embedding, views and what Python does between the kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from chiron_engine.config import EngineConfig
from chiron_engine.runtime.torch_environment import prepare_environment

CONTEXT, OUTPUT = 160, 64
PROMPTS, PROMPT = 4, 128


class OperatorTimes:
    """Seconds spent in wrapped functions since the last `take`."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, name: str, label: str | Callable[..., str]) -> None:
        """Count what `owner.name` takes under `label`, or under what that makes of its arguments."""
        function = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **named)
            took = time.perf_counter() - start
            self._seconds[label if isinstance(label, str) else label(*arguments, **named)] += took
            return result

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


def wrap_operators(times: OperatorTimes) -> None:
    """The operators of the native decoder in int8 and float32."""
    from chiron_engine.model import attention, compiled_attention, decoder_ops, linear
    from chiron_engine.runtime import torch_executor

    times.wrap(
        linear, "int8_linear", lambda library, x, weight: f"product {weight.inputs} x {weight.outputs}"
    )
    times.wrap(linear.Linear, "__call__", "float products")
    times.wrap(compiled_attention, "paged_attention", "attention")
    times.wrap(attention.TorchAttention, "attend", "attention")
    for name in ("add_rms_norm", "silu_multiply", "rotate"):
        times.wrap(decoder_ops.compiled, name, name)
    times.wrap(torch_executor, "sample", "sampling")


def profile(step: Callable[[], float], times: OperatorTimes, repeats: int) -> dict[str, float]:
    """Milliseconds by operator, with `rest` and `step`, medians of `repeats` steps after one more."""
    step()
    times.take()
    found: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        took = step()
        parts = times.take()
        for name, seconds in (*parts.items(), ("rest", took - sum(parts.values())), ("step", took)):
            found[name].append(seconds * 1e3)
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=20, help=f"steps of each kind, at most {OUTPUT - 2}")
    arguments = parser.parse_args()
    if not 1 <= arguments.repeats <= OUTPUT - 2:
        parser.error(f"--repeats is {arguments.repeats}; it must be between 1 and {OUTPUT - 2}")
    prepare_environment()
    from chiron_engine.runtime.build import build_executor
    from chiron_engine.runtime.trial_steps import TrialRequests

    config = EngineConfig(arguments.model, dtype=arguments.dtype, device="cpu", swap_space=0)
    executor, _ = build_executor(config)
    times = OperatorTimes()
    wrap_operators(times)
    result: dict[str, Any] = {"dtype": executor.model.precision.name}
    for rows in (1, 8, 32, 64):
        trial = TrialRequests(executor, rows, CONTEXT, OUTPUT)
        trial.prefill()
        result[f"decode {rows}"] = profile(trial.decode, times, arguments.repeats)
        trial.leave()
    trial = TrialRequests(executor, PROMPTS, PROMPT, 1)
    result[f"prompts {PROMPTS} x {PROMPT}"] = profile(trial.prefill, times, arguments.repeats)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
