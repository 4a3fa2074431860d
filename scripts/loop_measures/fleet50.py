"""Fifty engine processes behind one coordinator: nothing lost or doubled, and what it costs."""

from __future__ import annotations

import asyncio
import statistics

from chiron_engine.rpc.client import InferenceClient

from .measured import Measured, Options, milliseconds
from .open_load import ThroughServer, arrivals, compare, references, send, wait_fleet
from .processes import CpuClock, Server, memory, service_pids, serving

ENGINES = 50
RATE = 100.0
TOKENS = 20
SECONDS = 60.0
IDLE_S = 5.0
MOST_CORES = 0.3
MIB = 1 << 20


def measure(options: Options) -> Measured:
    count = str(ENGINES)
    fleet = ["--engines", count, "--min-engines", count, "--max-engines", count]
    with serving(*fleet, "--gateways", str(options.gateways)) as server:
        return asyncio.run(_measure(options, server))


async def _measure(options: Options, server: Server) -> Measured:
    measured = Measured()
    engines = [instance.pid for instance in await wait_fleet(server.address, ENGINES)]
    service = service_pids(server, engines)
    clock = CpuClock(*service)
    await asyncio.sleep(options.seconds(IDLE_S))
    idle_cores = clock.share
    async with InferenceClient(server.address) as client:
        target = ThroughServer(client)
        right = await references(target, TOKENS)
        clock, engine_clock = CpuClock(*service), CpuClock(*engines)
        coordinator_clock = CpuClock(server.pid)
        times = arrivals(RATE, options.seconds(SECONDS), options.seed)
        answers = await send(target, times, TOKENS)
        cores, engine_cores, idle = clock.share, engine_clock.share, clock.idle
        coordinator_cores = coordinator_clock.share
    wrong = compare(answers, right)
    sizes = [memory(pid) for pid in engines]
    own = memory(server.pid)
    ttft = [answer.ttft_s for answer in answers if answer.tokens]
    lag = [answer.sent - answer.due for answer in answers]
    measured.rows.append(
        {
            "engines": str(len(engines)),
            "requests": f"{len(answers):,}",
            "lost": str(wrong.lost),
            "doubled": str(wrong.doubled),
            "wrong": str(wrong.other),
            "coordinator\ncores": f"{cores:.3f}",
            "of which\nidle": f"{idle_cores:.3f}",
            "engines\ncores": f"{engine_cores:.2f}",
            "TTFT ms\np50 / p99": milliseconds(ttft),
            "sent late ms\np50 / p99": milliseconds(lag),
        }
    )
    resident, private, proportional = (
        statistics.median(getattr(size, name) for size in sizes) / MIB
        for name in ("resident", "private", "proportional")
    )
    measured.notes.append(
        f"an engine: {resident:.0f} MiB resident, {private:.0f} its own, {proportional:.0f} with its share "
        f"of what others use too; coordinator and gateway: {own.resident / MIB:.0f} MiB resident"
    )
    measured.notes.append(f"{idle:.0%} of the machine was idle")
    if options.gateways > 1:
        measured.notes.append(
            f"{options.gateways} gateways: {cores - coordinator_cores:.3f} of a core in all, the coordinator "
            f"alone {coordinator_cores:.3f}"
        )
    seen = f"{wrong.lost} lost, {wrong.doubled} doubled, {wrong.other} with other tokens"
    measured.judge("no request lost or doubled, every token the right one", seen, wrong.total == 0)
    target_text = (
        f"coordinator and gateway under {MOST_CORES} cores at {RATE:g} requests/s of {TOKENS} tokens"
    )
    measured.judge(target_text, f"{cores:.3f}", cores < MOST_CORES)
    measured.figures = {
        "requests": len(answers),
        "lost": wrong.lost,
        "doubled": wrong.doubled,
        "other_tokens": wrong.other,
        "errors": sorted({answer.error for answer in answers if answer.error}),
        "coordinator_cores": cores,
        "coordinator_cores_without_requests": idle_cores,
        "engine_cores": engine_cores,
        "machine_idle": idle,
        "engine_resident_mib": resident,
        "engine_private_mib": private,
        "engine_proportional_mib": proportional,
        "coordinator_resident_mib": own.resident / MIB,
    }
    return measured
