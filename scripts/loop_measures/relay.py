"""What stands between a client and an engine: time to the first token, and CPU of the coordinator."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass

from chiron_engine.core.step_stats import percentile
from chiron_engine.rpc.client import InferenceClient

from .measured import Measured, Options, cores, milliseconds
from .open_load import Answer, StraightToEngine, Target, ThroughServer, arrivals, send, wait_fleet
from .processes import CpuClock, Server, service_pids, serving

ENGINES = 10
TOKENS = 20
BUSY = 0.7
PROBE_RATE = 40.0
PROBE_S = 8.0
IDLE_S = 4.0
SECONDS = 30.0
MOST_RATE = 1000.0
MOST_ADDED_S = 5e-3


@dataclass(frozen=True, slots=True)
class Costs:
    """CPU seconds: of coordinator and gateways for a request of one token and for each further token, of all
    processes for a request of TOKENS; cores that all take without requests."""

    request_s: float
    token_s: float
    all_s: float
    idle_cores: float

    @property
    def rate(self) -> float:
        """Requests a second that keep BUSY of the machine busy."""
        return min(MOST_RATE, (BUSY * cores() - self.idle_cores) / self.all_s)


def measure(options: Options) -> Measured:
    count = str(ENGINES)
    fleet = ["--engines", count, "--min-engines", count, "--max-engines", count]
    with serving(*fleet, "--gateways", str(options.gateways)) as server:
        return asyncio.run(_measure(options, server))


async def _measure(options: Options, server: Server) -> Measured:
    measured = Measured()
    engines = await wait_fleet(server.address, ENGINES)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(InferenceClient(server.address))
        server_target = ThroughServer(client)
        pids = [server.pid, os.getpid(), *(engine.pid for engine in engines)]
        service = service_pids(server, [engine.pid for engine in engines])
        costs = await _costs(options, server_target, service, sorted({*pids, *service}))
        if costs.rate <= 1:
            raise ValueError("this machine is busy with the engines alone; there is no rate to measure at")
        times = arrivals(costs.rate, options.seconds(SECONDS), options.seed)
        relayed, idle = await _watched(server_target, times)
        straight = await stack.enter_async_context(StraightToEngine(engines[0].address))
        direct, direct_idle = await _watched(straight, times)
    for name, answers, share in (("the server", relayed, idle), ("an engine", direct, direct_idle)):
        measured.rows.append(
            {
                "sent to": name,
                "requests": f"{len(answers):,}",
                "failed": str(sum(bool(answer.error) for answer in answers)),
                "TTFT ms\np50 / p99": milliseconds(_ttft(answers)),
                "sent late ms\np50 / p99": milliseconds([a.sent - a.due for a in answers]),
                "machine\nidle": f"{share:.0%}",
            }
        )
    added = {p: percentile(_ttft(relayed), p) - percentile(_ttft(direct), p) for p in (50, 99)}
    measured.notes.append(
        f"{costs.rate:.0f} requests/s of {TOKENS} tokens on {ENGINES} engines: by the CPU time they took at "
        f"{PROBE_RATE:g} a second, {BUSY:.0%} of {cores()} cores"
    )
    measured.notes.append(
        f"CPU of coordinator and gateways ({options.gateways}): {costs.request_s * 1e3:.2f} ms for a request "
        f"of one token, {costs.token_s * 1e6:.0f} us for each further token"
    )
    seen = f"{added[99] * 1e3:.2f} ms ({added[50] * 1e3:.2f} ms at p50)"
    text = f"routing and relaying add at most {MOST_ADDED_S * 1e3:g} ms to TTFT at p99"
    measured.judge(text, seen, added[99] <= MOST_ADDED_S)
    measured.figures = {
        "rate": costs.rate,
        "added_p50_ms": added[50] * 1e3,
        "added_p99_ms": added[99] * 1e3,
        "cpu_per_request_ms": costs.request_s * 1e3,
        "cpu_per_token_us": costs.token_s * 1e6,
        "machine_idle": idle,
    }
    return measured


def _ttft(answers: list[Answer]) -> list[float]:
    return [answer.ttft_s for answer in answers if answer.tokens]


async def _costs(options: Options, target: Target, service: list[int], pids: list[int]) -> Costs:
    own, everyone = CpuClock(*service), CpuClock(*pids)
    await asyncio.sleep(options.seconds(IDLE_S))
    own_idle, all_idle = own.share, everyone.share
    times = arrivals(PROBE_RATE, options.seconds(PROBE_S), options.seed + 1)
    spent = {}
    for tokens in (1, TOKENS):
        own, everyone = CpuClock(*service), CpuClock(*pids)
        answers = await send(target, times, tokens)
        seconds = answers[-1].sent - answers[0].sent
        spent[tokens] = (own.seconds - own_idle * seconds) / len(answers)
        all_s = (everyone.seconds - all_idle * seconds) / len(answers)
    return Costs(spent[1], (spent[TOKENS] - spent[1]) / (TOKENS - 1), all_s, all_idle)


async def _watched(target: Target, times: list[float]) -> tuple[list[Answer], float]:
    """Answers, and the share of the machine that was idle meanwhile."""
    clock = CpuClock()
    answers = await send(target, times, TOKENS)
    return answers, clock.idle
