"""What `chiron bench` does: make the workload, ask the server for its model, replay, count."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import grpc
import grpc.aio
import numpy as np

from chiron_engine.bench.fitting import Clipped, fit_context, map_streams
from chiron_engine.bench.measured import Measured, measure
from chiron_engine.bench.prompts import PromptSource
from chiron_engine.bench.replay import Progress, Replay
from chiron_engine.bench.summary import bench_summary
from chiron_engine.rpc.client import InferenceClient
from chiron_engine.rpc.v1 import inference_pb2
from chiron_engine.sim.load_scaling import MAX_REQUESTS, superpose
from chiron_engine.sim.traces.columns import arrivals_of, take_rows
from chiron_engine.sim.workload import Workload

from .console import RunProgress
from .exits import CommandError
from .simulation import describe_stream, load_workload, scale_workload, seed_of, slo_record
from .simulation_options import class_slos

INFO_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class BenchRun:
    """summary: the JSON; None where nothing was sent, as measured. lines: what was run."""

    summary: dict[str, Any] | None
    measured: Measured | None
    lines: list[str]
    interrupted: bool


def load(options: Mapping[str, Any]) -> Workload:
    """The workload as it is to be sent, but for the model's context. Raises ValueError that says what
    is wrong with a trace or its scaling."""
    profile, batch_1_step_s = None, 1.0  # of no effect: only an SLO as 1.5x needs it, and a profile
    if options["profile"] is not None:
        from chiron_engine.sim.feasibility import batch_1_step_s as step_of
        from chiron_engine.sim.profiles import load_profile

        profile = load_profile(options["profile"])
        batch_1_step_s = step_of(profile)
    slos = class_slos(options, batch_1_step_s)
    seed = options["seed"]
    asked = load_workload(options["interactive"], options["batch"], slos, seed, options["duration"])
    if profile is not None:
        asked = scale_workload(asked, profile, options["load"], options["batch_load"], seed)
    if options["rate_scale"] is not None:
        asked = _scale_rate(asked, options["rate_scale"], seed)
    if options["requests"] is not None:
        asked = first_requests(asked, options["requests"])
    return asked


def _scale_rate(workload: Workload, factor: float, seed: int) -> Workload:
    if factor * workload.num_requests > MAX_REQUESTS:
        raise ValueError(f"--rate-scale {factor:g} makes more than {MAX_REQUESTS:,} requests of the trace")
    return map_streams(
        workload,
        lambda stream: superpose(stream.trace, factor, seed_of(f"scale {stream.slo_class.name}", seed)),
    )


def first_requests(workload: Workload, count: int) -> Workload:
    """The first `count` requests of all classes together, in order of arrival."""
    taken = {stream.slo_class: 0 for stream in workload.streams}
    for _, _, stream, _ in islice(workload.arrivals(), count):
        taken[stream.slo_class] += 1
    cut = map_streams(
        workload,
        lambda stream: take_rows(
            stream.trace,
            np.arange(taken[stream.slo_class]),
            arrivals_of(stream.trace)[: taken[stream.slo_class]],
        ),
    )
    interactive = cut.interactive if cut.interactive and len(cut.interactive.trace) else None
    batch = cut.batch if cut.batch and len(cut.batch.trace) else None
    return Workload(interactive, batch)


def run(address: str, asked: Workload, options: Mapping[str, Any]) -> BenchRun:
    """Raises CommandError where no server answers that can serve."""
    return asyncio.run(_run(address, asked, options))


async def _run(address: str, asked: Workload, options: Mapping[str, Any]) -> BenchRun:
    async with InferenceClient(address) as client:
        info = await _model_info(client)
        try:
            workload, clipped = fit_context(asked, info.max_model_len)
            prompts = PromptSource(info.vocab_size, info.eos_token_ids, options["seed"])
        except ValueError as error:
            raise CommandError(f"the server at {address}: {error}") from error
        replay = Replay(client, workload, prompts, options["timeout"])
        cpu_s = time.process_time()
        with _interruptible() as stop, _progress(address, workload) as progress:
            completed = await replay.run(stop, progress)
        cpu_s = time.process_time() - cpu_s
    measured = measure(workload, replay.log, replay.wall_s)
    lines = [f"{info.name} at {address}, {info.engines} engine{'s' * (info.engines != 1)}"]
    lines += [describe_stream(stream) for stream in workload.streams]
    if measured is None:
        return BenchRun(None, None, lines, interrupted=True)
    if not completed:
        sent, wall_s = measured.result.workload.num_requests, replay.wall_s
        lines.append(f"interrupted after {wall_s:.1f} s: {sent:,} of {workload.num_requests:,} requests sent")
    record = _record(address, info, workload, clipped, options)
    summary = bench_summary(measured, cpu_s=cpu_s, interrupted=not completed, **record)
    return BenchRun(summary, measured, lines, interrupted=not completed)


async def _model_info(client: InferenceClient) -> inference_pb2.ModelInfo:
    try:
        return await client.model_info(INFO_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        details = error.details() or "no details"
        if error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details.lower():
            details = f"no server answers at {client.address}; is `chiron serve` running?"
            raise CommandError(details) from None
        raise CommandError(f"the server at {client.address} answers {error.code().name}: {details}") from None


def _record(
    address: str,
    info: inference_pb2.ModelInfo,
    workload: Workload,
    clipped: Clipped,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What was asked of what."""
    names = ("load", "batch_load", "rate_scale", "profile", "timeout")
    given = {name: options[name] for name in names if options[name] is not None}
    return {
        "clipped": {"prompts": clipped.prompts, "outputs": clipped.outputs},
        "address": address,
        "model": info.name,
        "dtype": info.dtype,
        "max_model_len": info.max_model_len,
        "engines_at_start": info.engines,
        "server_version": info.version,
        "seed": options["seed"],
        "slo": slo_record(workload),
        **given,
    }


@contextmanager
def _interruptible() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C sets, instead of breaking off; a second Ctrl-C breaks off."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextmanager
def _progress(address: str, workload: Workload) -> Iterator[Progress]:
    bar = RunProgress(address, max(stream.trace.span_s for stream in workload.streams))
    count = workload.num_requests
    try:
        yield lambda now, sent, flying: bar(now, f"{sent:,} of {count:,} sent, {flying:,} in flight")
    finally:
        bar.done()
