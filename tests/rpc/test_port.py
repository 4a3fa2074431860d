"""A port in use is refused at once, naming who holds it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time

import pytest

from chiron_engine.rpc.port import BindError, PortInUse, bind, find_holder
from chiron_engine.rpc.server import create_server

HOLD = """
import socket, sys, time
holder = socket.create_server(("127.0.0.1", 0))
print(holder.getsockname()[1], flush=True)
time.sleep(60)
"""


def try_to_bind(host: str, port: int) -> int:
    async def attempt() -> int:
        server = create_server()
        try:
            return bind(server, host, port)
        finally:
            await server.stop(0)

    return asyncio.run(attempt())


def test_names_pid_and_command_of_the_holder() -> None:
    command = [sys.executable, "-c", HOLD, "marker"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        port = int(holder.stdout.readline())
        try:
            started = time.monotonic()
            with pytest.raises(PortInUse) as error:
                try_to_bind("127.0.0.1", port)
            assert time.monotonic() - started < 2.0
            assert error.value.holder is not None
            assert error.value.holder.pid == holder.pid
            assert "marker" in str(error.value)
            assert str(holder.pid) in str(error.value) and str(port) in str(error.value)
        finally:
            holder.kill()


def test_a_second_server_of_ours_is_refused_too() -> None:
    async def check() -> None:
        first, second = create_server(), create_server()
        port = bind(first, "127.0.0.1", 0)
        await first.start()
        with pytest.raises(PortInUse) as error:
            bind(second, "127.0.0.1", port)
        assert error.value.holder is not None and error.value.holder.pid == os.getpid()
        await first.stop(0)

    asyncio.run(check())


def test_all_interfaces_conflict_with_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder, pytest.raises(PortInUse):
        try_to_bind("0.0.0.0", holder.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("127.0.0.1", -1, "between 0"),
        ("127.0.0.1", 65536, "between 0"),
        ("203.0.113.7", 0, "cannot listen on 203.0.113.7"),
        ("no such host", 0, "unknown host"),
    ],
)
def test_other_causes_are_named(host: str, port: int, says: str) -> None:
    with pytest.raises(BindError, match=says) as error:
        try_to_bind(host, port)
    assert not isinstance(error.value, PortInUse)


def test_port_0_gives_a_free_port() -> None:
    assert try_to_bind("127.0.0.1", 0) > 0


def test_nobody_holds_a_free_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    assert find_holder(port) is None
