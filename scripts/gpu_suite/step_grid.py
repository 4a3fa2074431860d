"""Step times over a grid of decode batches, contexts and prompts, and the linear model through them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.runtime.torch_executor import TorchExecutor
from chiron_engine.runtime.trial_steps import TrialRequests

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
PROMPTS = (16, 64, 256, 512, 1024, 2048, 4096, 8192)
PROMPT_CONTEXTS = (1024, 4096, 16384)
CONTINUED_PROMPT = 512
COEFFICIENTS = 5

MIN_STEPS, MAX_STEPS = 3, 12
SECONDS_PER_POINT = 0.5


@dataclass(slots=True)
class GridPoint:
    """One kind of step. ms: median wall milliseconds of a step, from submit to collect; device_ms:
    the executor's own figure. kv_full: the point fills the KV pool."""

    decode_requests: int
    context: int
    prompt_tokens: int
    ms: float
    device_ms: float
    steps: int
    kv_full: bool = False


def fill_with_noise(executor: TorchExecutor) -> None:
    """Random keys and values, a layer at a time, so that no kernel is timed on zeros."""
    pool = executor.device_pool
    with torch.inference_mode():
        for layer in range(len(pool.layers)):
            for blocks in pool.kv(layer).split(1024):
                blocks.normal_(std=0.5)


def decode_points(executor: TorchExecutor) -> Iterator[tuple[int, int, bool]]:
    """(batch, context, fills the pool) for all that fits; each batch ends with what fills the pool."""
    shape = executor.shape
    room = MAX_STEPS + 3
    for batch in BATCHES:
        if batch > shape.max_slots:
            return
        width = shape.num_device_blocks // batch * shape.block_size
        longest = min(width, shape.max_model_len) - room
        fitting = [context for context in CONTEXTS if context <= longest]
        yield from ((batch, context, False) for context in fitting)
        if longest > (fitting[-1] if fitting else 0):
            yield batch, longest, width <= shape.max_model_len


def prompt_points(executor: TorchExecutor) -> Iterator[tuple[int, int]]:
    """(tokens, context before them) for all that fits."""
    shape = executor.shape
    longest = min(shape.max_model_len, shape.num_device_blocks * shape.block_size) - 1
    yield from ((tokens, 0) for tokens in PROMPTS if tokens <= min(shape.max_step_tokens, longest))
    if shape.max_step_tokens >= CONTINUED_PROMPT:
        for context in PROMPT_CONTEXTS:
            if context + CONTINUED_PROMPT <= longest:
                yield CONTINUED_PROMPT, context


def measure_grid(executor: TorchExecutor, deadline: float, skipped: list[str]) -> list[GridPoint]:
    """All points until `deadline` on time.monotonic's clock; what was left out goes to `skipped`."""
    fill_with_noise(executor)
    points: list[GridPoint] = []
    for tokens, context in prompt_points(executor):
        if time.monotonic() > deadline:
            skipped.append(f"prompt of {tokens} after {context}: out of time")
            continue
        points.append(prompt_point(executor, tokens, context))
    for batch, context, kv_full in decode_points(executor):
        if time.monotonic() > deadline:
            skipped.append(f"decode of {batch} at context {context}: out of time")
            continue
        points.append(decode_point(executor, batch, context, kv_full))
    return points


def decode_point(executor: TorchExecutor, batch: int, context: int, kv_full: bool) -> GridPoint:
    trial = TrialRequests(executor, batch, context, MAX_STEPS + 2)
    trial.prefill(start=context - 1)
    trial.decode()
    wall, device = _repeat(trial.decode)
    trial.leave()
    return GridPoint(batch, context, 0, _median_ms(wall), _median_ms(device), len(wall), kv_full)


def prompt_point(executor: TorchExecutor, tokens: int, context: int) -> GridPoint:
    trial = TrialRequests(executor, 1, context + tokens, 1)
    trial.prefill(start=context)
    wall, device = _repeat(lambda: trial.prefill(start=context))
    trial.leave()
    return GridPoint(0, context, tokens, _median_ms(wall), _median_ms(device), len(wall))


def _repeat(step: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Wall and device seconds of a few calls."""
    wall: list[float] = []
    device: list[float] = []
    began = time.perf_counter()
    while len(wall) < MIN_STEPS or (
        len(wall) < MAX_STEPS and time.perf_counter() - began < SECONDS_PER_POINT
    ):
        start = time.perf_counter()
        device.append(step())
        wall.append(time.perf_counter() - start)
    return wall, device


def _median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def features(point: GridPoint) -> list[float]:
    """What StepCosts multiplies: 1, n, K, P and C, for the contexts a point's steps ran at."""
    kv_tokens = point.decode_requests * point.context
    prompt_context = point.prompt_tokens * (point.context + point.prompt_tokens)
    return [1.0, point.decode_requests, kv_tokens, point.prompt_tokens, prompt_context]


def fit_step_time(points: list[GridPoint]) -> tuple[StepCosts, float]:
    """Coefficients, none negative, that minimise the squared relative error, and the mean absolute
    relative error they leave. Coefficients that would be negative are fixed at 0, one at a time."""
    seconds = np.array([p.ms for p in points]) / 1e3
    rows = np.array([features(p) for p in points]) / seconds[:, None]
    scale = np.abs(rows).max(axis=0)
    scale[scale == 0] = 1.0
    free = list(range(rows.shape[1]))
    values = np.zeros(rows.shape[1])
    while free:
        solved = np.linalg.lstsq(rows[:, free] / scale[free], np.ones(len(points)), rcond=None)[0]
        if solved.min() >= 0:
            values[free] = solved / scale[free]
            break
        del free[int(solved.argmin())]
    error = float(np.abs(rows @ values - 1.0).mean())
    return StepCosts(*(float(v) for v in values)), error
