"""SIGKILL at random moments: of engines while streams run there, of the coordinator while a batch runs."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass

from .server import ENGINES, Instances, Server
from .traffic import Batches


@dataclass(frozen=True, slots=True)
class Kill:
    """running: streams, or batch lines, that the victim had by the last report. back_s: until there were
    as many engines again, or the server served again."""

    victim: str
    running: int
    back_s: float


def all_busy(engines: Instances) -> bool:
    return len(engines) == ENGINES and all(engine.telemetry.running_interactive for engine in engines)


async def kill_engines(server: Server, count: int, within_s: float, chance: random.Random) -> list[Kill]:
    """One at a time, with streams on both of them."""
    kills: list[Kill] = []
    while len(kills) < count:
        await server.wait_engines(all_busy)
        await asyncio.sleep(chance.uniform(0.0, within_s))
        engines = await server.ready_engines()
        victim = chance.choice(sorted(engines, key=lambda engine: engine.instance_id))
        running = victim.telemetry.running_interactive
        if not running or len(engines) < ENGINES:
            continue
        os.kill(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        pid = victim.pid
        await server.wait_engines(
            lambda now, pid=pid: len(now) == ENGINES and pid not in {e.pid for e in now}
        )
        kills.append(Kill(f"engine {victim.instance_id}", running, time.monotonic() - killed))
    return kills


async def kill_coordinator(
    server: Server, batches: Batches, count: int, within_s: float, chance: random.Random
) -> list[Kill]:
    """Each time while lines of a batch run."""
    kills: list[Kill] = []
    while len(kills) < count:
        await batches.wait_running()
        await asyncio.sleep(chance.uniform(0.0, within_s))
        running = await batches.wait_running()
        server.kill()
        await asyncio.sleep(chance.uniform(0.0, 1.0))
        kills.append(Kill("coordinator", running, await server.start()))
    return kills
