"""Gateway processes are started again, also where that fails for a while."""

from __future__ import annotations

import asyncio
import sys

import pytest

from chiron_engine.cluster import gateway_processes
from chiron_engine.cluster.gateway_processes import GatewayProcesses

ENDS = "print('ready', flush=True)"


def command(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_command_that_cannot_be_run_is_told() -> None:
    async def check() -> None:
        gateways = GatewayProcesses(["/nowhere/python"], 2, lambda index, line: None)
        gateways.start()
        with pytest.raises(RuntimeError, match="could not be started: No such file"):
            await gateways.wait_ready()
        await gateways.close()

    asyncio.run(check())


def test_one_that_cannot_be_started_again_is_tried_until_it_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = asyncio.create_subprocess_exec
    starts = 0

    async def start_or_fail(*args: object, **kwargs: object) -> asyncio.subprocess.Process:
        nonlocal starts
        starts += 1
        if starts in (2, 3):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return await start(*args, **kwargs)  # type: ignore[arg-type]

    async def check() -> None:
        monkeypatch.setattr(gateway_processes, "RESTART_S", 0.01)
        monkeypatch.setattr(asyncio, "create_subprocess_exec", start_or_fail)
        gateways = GatewayProcesses(command(ENDS), 1, lambda index, line: None)
        gateways.start()
        await gateways.wait_ready()
        async with asyncio.timeout(10):
            while starts < 5:
                await asyncio.sleep(0.01)
        await gateways.close()
        assert caplog.text.count("could not be started: Resource temporarily") == 2
        assert "ended with exit code 0" in caplog.text

    asyncio.run(check())
