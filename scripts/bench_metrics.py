"""What one scrape of a fleet's metrics costs: seconds of the coordinator's event loop, which waits while
the state is copied, and of the thread that writes the text.

    PYTHONPATH=.:kernels python scripts/bench_metrics.py [ENGINES]
"""

from __future__ import annotations

import asyncio
import sys
import time
from statistics import median

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from chiron_engine.cluster.coordinator import Coordinator
from chiron_engine.cluster.engines import Engine
from chiron_engine.cluster.metrics import Snapshot, metrics_of, snapshot
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import Role, SetRole
from chiron_engine.rpc.v1 import coordinator_pb2

REPEAT = 50


class Taken(Collector):
    def __init__(self, taken: Snapshot) -> None:
        self._taken = taken

    def describe(self) -> list:
        return []

    def collect(self):
        return metrics_of(self._taken)


def engine(number: int) -> Engine:
    one = Engine(number, 0.0, role=SetRole(number, Role.MIXED, 0.2), is_ready=True)
    one.register = coordinator_pb2.Register(
        boot_id=f"{number:032x}", address=f"10.0.0.{number}:50051", host="host", pid=4000 + number
    )
    one.telemetry = coordinator_pb2.Telemetry(
        step=10**6, running_interactive=12, running_batch=30, kv_tokens=10**5, max_running=64, itl_s=0.03,
        output_tokens_total=10**8, free_blocks=500, total_blocks=2000, phase="ready",
    )  # fmt: skip
    return one


async def main(engines: int) -> None:
    coordinator = Coordinator("chiron", FleetConfig(max_gpus=engines), None)
    coordinator.roster.engines.update({number: engine(number) for number in range(engines)})
    held, written, size = [], [], 0
    for _ in range(REPEAT):
        begin = time.perf_counter()
        taken = snapshot(coordinator, "model")
        held.append(time.perf_counter() - begin)
        registry = CollectorRegistry()
        registry.register(Taken(taken))
        begin = time.perf_counter()
        size = len(generate_latest(registry))
        written.append(time.perf_counter() - begin)
    print(
        f"{engines} engines: event loop {1e3 * median(held):.2f} ms, text {1e3 * median(written):.2f} ms, "
        f"{size / 1024:.0f} KiB (medians of {REPEAT})"
    )


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 50))
