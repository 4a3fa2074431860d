"""`chiron top`: a running fleet, live."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from .coordinator_call import DEFAULT_SERVER, Server, answer
from .durations import parse_duration

if TYPE_CHECKING:
    from chiron_engine.rpc.v1.coordinator_pb2 import Fleet

HISTORY = 40
BARS = "▁▂▃▄▅▆▇█"
SHORTEST_S = 0.1


def _interval(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if seconds < SHORTEST_S:
        raise typer.BadParameter(f"{text!r} is less than {SHORTEST_S:g} s")
    return seconds


def top(
    server: Server = DEFAULT_SERVER,
    interval: Annotated[
        Any, Option(parser=_interval, metavar="TIME", help="Between two looks at the fleet.")
    ] = "1s",
    count: Annotated[int | None, Option(min=1, help="Looks before it ends (until q or Ctrl-C).")] = None,
) -> None:
    """Show a fleet live: its engines, the quantities that scale it, and how limits and queues went.
    q ends it. Plain lines where standard output is no terminal."""
    try:
        asyncio.run(_run(server, interval, count))
    except KeyboardInterrupt:
        from .exits import ExitCode

        raise typer.Exit(ExitCode.INTERRUPT) from None


class History:
    """The last values of limits, by engine, and of queues."""

    def __init__(self) -> None:
        self._limits: dict[int, deque[float]] = {}
        self._queues: dict[str, deque[float]] = {}

    def add(self, fleet: Fleet) -> None:
        limits = {one.instance_id: one.telemetry.max_running for one in fleet.instances}
        self._limits = {key: self._limits.get(key, deque(maxlen=HISTORY)) for key in limits}
        for key, limit in limits.items():
            self._limits[key].append(limit)
        queues = {
            "engines": len(fleet.instances),
            "held": fleet.held_interactive,
            "queued batch": fleet.queued_batch,
            "waiting": sum(one.telemetry.waiting for one in fleet.instances),
        }
        for name, length in queues.items():
            self._queues.setdefault(name, deque(maxlen=HISTORY)).append(length)

    def lines(self) -> list[str]:
        named = [(f"limit of {key}", values) for key, values in self._limits.items()]
        named += list(self._queues.items())
        width = max(len(name) for name, _ in named)
        return [f"{name:<{width}}  {sparkline(values)}  {values[-1]:g}" for name, values in named]


def sparkline(values: deque[float]) -> str:
    """A bar for each value; the tallest is the largest of them."""
    most = max(values)
    if most <= 0:
        return BARS[0] * len(values)
    return "".join(BARS[int(value / most * (len(BARS) - 1))] for value in values)


async def _run(server: str, interval: float, count: int | None) -> None:
    from chiron_engine.rpc.client import CoordinatorClient

    history, quit_asked = History(), asyncio.Event()
    looks = 0
    with _screen() as show, _quit_key(quit_asked):
        async with CoordinatorClient(server) as client:
            while not quit_asked.is_set() and (count is None or looks < count):
                if looks:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(quit_asked.wait(), interval)
                        return
                fleet = await answer(server, client.fleet())
                history.add(fleet)
                show(fleet, history)
                looks += 1


@contextlib.contextmanager
def _screen() -> Iterator[Any]:
    """Yields show(fleet, history)."""
    from .fleet_table import summary, table

    if not sys.stdout.isatty():
        yield lambda fleet, history: print(
            "\n".join([time.strftime("%H:%M:%S"), *summary(fleet), *table(fleet)]), flush=True
        )
        return
    from rich.live import Live
    from rich.text import Text

    with Live(screen=True, auto_refresh=False) as live:
        yield lambda fleet, history: live.update(
            Text("\n".join([*summary(fleet), "", *table(fleet), "", *history.lines()]), no_wrap=True),
            refresh=True,
        )


@contextlib.contextmanager
def _quit_key(asked: asyncio.Event) -> Iterator[None]:
    """Sets `asked` when q is pressed, where there is a keyboard."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield
        return
    import termios
    import tty

    stdin, loop = sys.stdin.fileno(), asyncio.get_running_loop()

    def pressed() -> None:
        if os.read(stdin, 1) in (b"q", b"Q", b""):
            asked.set()

    before = termios.tcgetattr(stdin)
    tty.setcbreak(stdin)
    loop.add_reader(stdin, pressed)
    try:
        yield
    finally:
        loop.remove_reader(stdin)
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
