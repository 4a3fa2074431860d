"""Stopping: first request, second request, and the watchdog against an event loop that is stuck."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time

from chiron_engine.rpc.shutdown import Shutdown

HOT_LOOP = """
import asyncio
from chiron_engine.rpc.shutdown import Shutdown

async def main():
    Shutdown(0.3, hard_exit_grace_s=0.3).install()
    print("ready", flush=True)
    while True:
        pass

asyncio.run(main())
"""


def test_first_and_second_request() -> None:
    async def check() -> None:
        shutdown = Shutdown(5.0)
        shutdown.request()
        await asyncio.wait_for(shutdown.drain.wait(), 1)
        assert not shutdown.now.is_set()
        shutdown.request()
        await asyncio.wait_for(shutdown.now.wait(), 1)
        shutdown.finished()

    asyncio.run(check())


def test_waits_for_the_drain_the_timeout_or_the_second_request() -> None:
    async def check() -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        assert await Shutdown(5.0).wait_drained(done)
        assert not await Shutdown(0.05).wait_drained(done, never)
        impatient = Shutdown(60.0)
        impatient.now.set()
        assert not await asyncio.wait_for(impatient.wait_drained(never), 1)
        assert not never.cancelled()

    asyncio.run(check())


def test_a_hot_event_loop_is_ended_by_the_watchdog() -> None:
    with subprocess.Popen([sys.executable, "-c", HOT_LOOP], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            assert process.wait(10) == 1
            assert time.monotonic() - started < 5
        finally:
            process.kill()
