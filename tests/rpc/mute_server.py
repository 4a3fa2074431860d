"""A server that takes a call, never answers it, and is killed at the worst moment."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from types import TracebackType
from typing import Self

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER for no time: what a killed process' peers see
SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # of HTTP/2, empty: the connection is up then, and calls are sent
CALLED_S = 0.2
NOTICED_S = 0.1


class MuteServer:
    """Listens from the start; `address` is where."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    async def die_unheard(self) -> None:
        """Take a call and reset its connection. gRPC has noticed on return, and the event loop, which was
        busy, has yet to hear: the next thing to run there comes before the call's failure."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):
            connection, _ = await loop.sock_accept(self._listener)
            await loop.sock_sendall(connection, SETTINGS)
        await asyncio.sleep(CALLED_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._listener.close()
        connection.close()
        time.sleep(NOTICED_S)
        await asyncio.sleep(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
