"""`chiron coordinator` and engines that join it by themselves: real processes without a model."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chiron_engine.cluster.engine_roster import SILENT_S
from tests.cli.chiron_process import Server, is_alive, wait_gone
from tests.cli.fleet_process import SIMULATED, ask_fleet, free_port, generate, told, wait_fleet, wait_until

DEAD_WITHIN_S = 11.0


def coordinator(port: int, state: Path, *more: str) -> list[str]:
    return ["coordinator", "tiny", *SIMULATED, "--grpc-port", str(port), "--state-dir", str(state), *more]


def engine(port: int, *more: str, model: str = "tiny") -> list[str]:
    return ["engine", model, *SIMULATED, "--grpc-port", "0", "--join", f"127.0.0.1:{port}", *more]


def test_a_fleet_is_what_has_joined(tmp_path: Path) -> None:
    """Engines come, stay however little there is to do, leave, and the last one's loss is reported."""
    port = free_port()
    with Server(coordinator(port, tmp_path)) as server, Server(engine(port)) as first:
        assert server.wait_ready(), server.stderr
        assert f"chiron engine tiny --join 127.0.0.1:{port}" in server.stderr
        with Server(engine(port)) as second:
            pids = {first.process.pid, second.process.pid}
            assert wait_fleet(port, 2).keys() == pids
            time.sleep(3.0)  # some ticks
            fleet = ask_fleet(port)
            assert {instance.pid for instance in fleet.instances} == pids
            assert (fleet.min_instances, fleet.max_devices) == (2, 2)
            with Server(engine(port, model="other")) as other:
                assert other.wait(20) == 1
                assert other.process.stdout is not None
                report = json.loads(other.process.stdout.read().splitlines()[-1])
                assert "model is other; this coordinator serves tiny" in report["message"]
            second.signal(signal.SIGTERM)
            assert second.wait(20) == 0
        # It said goodbye: from its silence alone that is known only later.
        assert wait_fleet(port, 1, SILENT_S - 1.0).keys() == {first.process.pid}
        assert len(generate(port)) == 20
        assert server.engine_pids() == []
        first.signal(signal.SIGTERM)
        assert first.wait(20) == 0
        wait_until(lambda: "--join" in ask_fleet(port).trouble)
        with Server(engine(port)) as third:
            assert wait_fleet(port, 1).keys() == {third.process.pid}
            assert "--join" not in ask_fleet(port).trouble
            assert len(generate(port)) == 20
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_stopped_engine_is_given_up_and_comes_back_as_another(tmp_path: Path) -> None:
    """One that was launched is killed and replaced; one that joined has to join anew. The requests go on
    elsewhere meanwhile."""
    port = free_port()
    slow = ["--time-scale", "8"]
    started = coordinator(port, tmp_path, *slow, "--engines", "1")
    clients = ThreadPoolExecutor(6)
    with clients, Server(started) as server, Server(engine(port, *slow)) as joined:
        assert server.wait_ready(), server.stderr
        before = wait_fleet(port, 2)
        (local,) = set(before) - {joined.process.pid}
        undisturbed = generate(port, 60, seed=3)
        streams = [clients.submit(generate, port, 60, seed=3) for _ in range(6)]
        wait_until(lambda: sum(i.telemetry.running_interactive for i in ask_fleet(port).instances) >= 4)
        began = time.monotonic()
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        assert wait_gone([local], DEAD_WITHIN_S + 2.0)
        wait_until(lambda: joined.process.pid not in {i.pid for i in ask_fleet(port).instances})
        assert 5.0 < time.monotonic() - began < DEAD_WITHIN_S + 2.0
        assert [told(stream) for stream in streams] == [undisturbed] * 6
        os.kill(joined.process.pid, signal.SIGCONT)
        after = wait_fleet(port, 2)
        assert after[joined.process.pid] > max(before.values())
        assert is_alive(joined.process.pid)
        assert generate(port, 60, seed=3) == undisturbed
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
