#!/usr/bin/env python3
"""Both loops at work on a real model, on this machine, watched and asserted.

Starts `chiron serve smollm2` with one engine that may become two, gives it batch work, then replays
a busy stretch of a recorded trace (Azure's conversations of 2023, time and lengths scaled down to what two
CPU cores can do). While that runs it looks at the fleet twice a second. It must see the running batch
resized, batch requests evicted and then done, a second engine launched, and one of the two retired once
the burst is over. Writes a plot and a summary; exits 1 where something was not seen.

Takes about ten minutes: an engine is retired when four minutes did not need it.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from chiron_engine.rpc.client import InferenceClient, sampling
from chiron_engine.rpc.v1 import coordinator_pb2, coordinator_pb2_grpc, inference_pb2, types_pb2

TRACE = "azure_conv.csv.gz"
LOOK_EVERY_S = 0.5
READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Look:
    """The fleet at one moment. limits, running_interactive, running_batch: by instance."""

    at_s: float
    states: dict[int, str]
    roles: dict[int, str]
    limits: dict[int, int]
    running_interactive: dict[int, int]
    running_batch: dict[int, int]
    busy: float
    target: int
    queued_batch: int


@dataclass(slots=True)
class Outcome:
    """What became of the requests of one class."""

    sent: int = 0
    done: int = 0
    failures: list[str] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    evictions: int = 0


def busy_stretch(seconds: float, speed_up: float, shrink: int) -> list[Arrival]:
    """The busiest stretch of the trace that lasts `seconds` once played `speed_up` times as fast."""
    with gzip.open(str(files("chiron_engine.sim") / "data" / "traces" / TRACE), "rt") as file:
        rows = [
            Arrival(float(r["arrival_s"]), int(r["prompt_tokens"]), int(r["output_tokens"]))
            for r in csv.DictReader(file)
        ]
    width = seconds * speed_up
    best, best_count, last = 0, 0, 0
    for first, row in enumerate(rows):
        while last < len(rows) and rows[last].at_s < row.at_s + width:
            last += 1
        if last - first > best_count:
            best, best_count = first, last - first
    start = rows[best].at_s
    return [
        Arrival(
            (row.at_s - start) / speed_up,
            max(4, row.prompt_tokens // shrink),
            max(4, row.output_tokens // shrink),
        )
        for row in rows[best : best + best_count]
    ]


class Demonstration:
    def __init__(self, address: str, seconds: float) -> None:
        self._client = InferenceClient(address)
        self._fleet = coordinator_pb2_grpc.CoordinatorStub(self._client.channel)
        self._began = time.monotonic()
        self._seconds = seconds
        self.looks: list[Look] = []
        self.interactive = Outcome()
        self.batch = Outcome()

    def now(self) -> float:
        return time.monotonic() - self._began

    async def run(self, arrivals: list[Arrival], batch_requests: int, until_retired_s: float) -> None:
        async with self._client:
            await self._client.wait_serving(READY_S)
            self._began = time.monotonic()
            watching = asyncio.create_task(self._watch())
            batch = [
                asyncio.create_task(self._ask(Arrival(0.0, 40, 200), i, self.batch, is_batch=True))
                for i in range(batch_requests)
            ]
            await asyncio.sleep(15.0)
            replay = [
                asyncio.create_task(self._ask_at(15.0, arrival, i)) for i, arrival in enumerate(arrivals)
            ]
            await asyncio.gather(*replay)
            await asyncio.gather(*batch)
            await self._wait_retired(until_retired_s)
            watching.cancel()

    async def _wait_retired(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            await asyncio.sleep(LOOK_EVERY_S)
            if len(self.looks[-1].states) < max(len(look.states) for look in self.looks):
                return

    async def _ask_at(self, start_s: float, arrival: Arrival, number: int) -> None:
        await asyncio.sleep(max(0.0, start_s + arrival.at_s - self.now()))
        await self._ask(arrival, 1000 + number, self.interactive, is_batch=False)

    async def _ask(self, arrival: Arrival, number: int, outcome: Outcome, *, is_batch: bool) -> None:
        slo_class = types_pb2.SLO_CLASS_BATCH if is_batch else types_pb2.SLO_CLASS_INTERACTIVE
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(
                ids=[(97 * i + 31 * number) % 49_000 + 20 for i in range(arrival.prompt_tokens)]
            ),
            sampling=sampling(temperature=0.0, max_tokens=arrival.output_tokens, ignore_eos=True),
            slo=types_pb2.Slo(slo_class=slo_class),
        )
        outcome.sent += 1
        sent = time.monotonic()
        tokens = 0
        try:
            async for chunk in self._client.generate(request):
                if not tokens and chunk.token_ids:
                    outcome.ttft_s.append(time.monotonic() - sent)
                tokens += len(chunk.token_ids)
                outcome.evictions += chunk.timing.preemptions
        except Exception as error:
            outcome.failures.append(str(error))
            return
        if tokens == arrival.output_tokens:
            outcome.done += 1
        else:
            outcome.failures.append(f"{tokens} of {arrival.output_tokens} tokens")

    async def _watch(self) -> None:
        while True:
            fleet = await self._fleet.GetFleet(coordinator_pb2.GetFleetRequest())
            instances = fleet.instances
            self.looks.append(
                Look(
                    at_s=self.now(),
                    states={i.instance_id: i.state for i in instances},
                    roles={i.instance_id: i.role for i in instances},
                    limits={i.instance_id: i.telemetry.max_running for i in instances},
                    running_interactive={i.instance_id: i.telemetry.running_interactive for i in instances},
                    running_batch={i.instance_id: i.telemetry.running_batch for i in instances},
                    busy=fleet.busy,
                    target=fleet.target,
                    queued_batch=fleet.queued_batch,
                )
            )
            await asyncio.sleep(LOOK_EVERY_S)


def seen(demo: Demonstration) -> dict[str, bool]:
    """What must be seen, and whether it was."""
    looks = demo.looks
    limits = {limit for look in looks for limit in look.limits.values() if limit}
    return {
        "it began with one mixed engine": list(looks[0].roles.values()) == ["mixed"],
        "the running batch was resized": len(limits) >= 3,
        "a second engine was launched": any(
            sum(state == "ready" for state in look.states.values()) == 2 for look in looks
        ),
        "batch requests were evicted": demo.batch.evictions > 0,
        "every batch request was done": demo.batch.done == demo.batch.sent,
        "every interactive request was done": demo.interactive.done == demo.interactive.sent,
        "an engine was retired after": len(looks[-1].states) == 1,
    }


def plot(demo: Demonstration, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    times = [look.at_s for look in demo.looks]
    instances = sorted({i for look in demo.looks for i in look.states})
    for state, colour in (("ready", "tab:green"), ("loading", "tab:orange"), ("closing", "tab:grey")):
        count = [sum(s == state for s in look.states.values()) for look in demo.looks]
        axes[0].step(times, count, where="post", label=state, color=colour)
    axes[0].plot(times, [look.busy for look in demo.looks], label="demand D", color="black", lw=1)
    axes[0].set_ylabel("engines")
    for i in instances:
        axes[1].step(
            times, [look.limits.get(i) for look in demo.looks], where="post", label=f"limit, engine {i}"
        )
    axes[1].set_ylabel("max_running")
    for name, colour in (("running_interactive", "tab:blue"), ("running_batch", "tab:red")):
        values = [sum(getattr(look, name).values()) for look in demo.looks]
        axes[2].step(times, values, where="post", label=name.replace("_", " "), color=colour)
    axes[2].step(
        times, [look.queued_batch for look in demo.looks], where="post", label="queued batch", color="grey"
    )
    axes[2].set_ylabel("requests")
    axes[2].set_xlabel("seconds")
    for axis in axes:
        axis.legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=120)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=90.0, help="length of the replay")
    parser.add_argument("--speed-up", type=float, default=0.2, help="of the trace")
    parser.add_argument("--shrink", type=int, default=8, help="divides prompt and output lengths")
    parser.add_argument("--batch", type=int, default=24, help="batch requests of 40 + 200 tokens")
    parser.add_argument("--itl-slo", default="800ms")
    parser.add_argument("--out", type=Path, default=None, help="folder for plot, summary and event log")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="chiron-loops-"))
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [
        sys.executable, "-m", "chiron_engine", "serve", args.model, "--dtype", args.dtype,
        "--grpc-port", str(port), "--max-engines", "2", "--itl-slo", args.itl_slo,
        "--max-num-seqs", "32", "--event-log", str(out / "events.jsonl"), "--state-dir", str(out / "state"),
    ]  # fmt: skip
    with (out / "server.log").open("w") as server_log:
        server = subprocess.Popen(command, stdout=server_log, stderr=subprocess.STDOUT)
        try:
            demo = asyncio.run(demonstrate(args, port))
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
    report(demo, code, out)


async def demonstrate(args: argparse.Namespace, port: int) -> Demonstration:
    arrivals = busy_stretch(args.seconds, args.speed_up, args.shrink)
    demo = Demonstration(f"127.0.0.1:{port}", args.seconds)
    await demo.run(arrivals, args.batch, until_retired_s=420.0)
    return demo


def report(demo: Demonstration, code: int, out: Path) -> None:
    plot(demo, out / "loops.png")
    checks = {**seen(demo), "the server ended cleanly": code == 0}
    summary: dict[str, Any] = {
        "checks": checks,
        "interactive": {"sent": demo.interactive.sent, "done": demo.interactive.done},
        "batch": {"sent": demo.batch.sent, "done": demo.batch.done, "evictions": demo.batch.evictions},
        "failures": [*demo.interactive.failures, *demo.batch.failures][:10],
        "limits_seen": sorted({v for look in demo.looks for v in look.limits.values()}),
        "most_engines": max(len(look.states) for look in demo.looks),
        "ttft_s_median": statistics.median(demo.interactive.ttft_s or [0.0]),
        "ttft_s_max": max(demo.interactive.ttft_s, default=0.0),
        "seconds": demo.looks[-1].at_s,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    print(f"plot, event log and server log are in {out}", file=sys.stderr)
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
