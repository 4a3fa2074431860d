"""What processes write, line by line: from a pipe, or from a file that grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

CHUNK_BYTES = 1 << 16
POLL_S = 0.2


async def read_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of any length; StreamReader.readline raises on long ones."""
    rest = b""
    while chunk := await stream.read(CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


async def follow_lines(path: Path, start: int, has_ended: Callable[[], bool]) -> AsyncIterator[str]:
    """Lines from byte `start` on, until its writer has ended and all is read."""
    rest = b""
    with path.open("rb") as file:
        file.seek(start)
        while True:
            is_last = has_ended()  # asked first: what was written before that is read below
            while chunk := file.read(CHUNK_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace")
            if is_last:
                break
            await asyncio.sleep(POLL_S)
    if rest:
        yield rest.decode(errors="replace")
