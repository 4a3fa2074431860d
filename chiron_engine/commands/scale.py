"""`chiron scale`: how many engines a running fleet may have."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from .coordinator_call import DEFAULT_SERVER, Server, call


def scale(
    server: Server = DEFAULT_SERVER,
    least: Annotated[
        int | None,
        Option("--min", min=1, max=2**31 - 1, help="Engines kept for interactive requests at any load."),
    ] = None,
    most: Annotated[
        int | None, Option("--max", min=1, max=2**31 - 1, help="Engines there may be, a device each.")
    ] = None,
) -> None:
    """Change how many engines there may be; what is not given stays. Prints what holds.

    Also without options: launching starts again where five failures in a row had stopped it.
    """
    now = call(server, lambda client: client.scale(least, most))
    print(f"min {now.min_instances}, max {now.max_devices}")
