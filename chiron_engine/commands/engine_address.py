"""Where an engine of a fleet listens, and where it is reached."""

from __future__ import annotations

import socket
from dataclasses import replace

from chiron_engine.config import GatewayConfig

from .exits import usage_error

EVERY_ADDRESS = ("", "0.0.0.0", "::")


def fleet_addresses(
    listen: GatewayConfig, coordinator: str, advertise_host: str | None
) -> tuple[GatewayConfig, str]:
    """What to listen on, and the host to tell the coordinator. Where none was chosen both are this
    machine's address on the way to the coordinator. Raises CommandError (usage)."""
    own = route_address(coordinator)
    if listen.host == GatewayConfig().host:
        listen = replace(listen, host=own)
    return listen, advertise_host or (own if listen.host in EVERY_ADDRESS else listen.host)


def route_address(target: str, option: str = "--join") -> str:
    """This machine's address on the way to `target` (host:port). Nothing is sent. option: that named the
    target. Raises CommandError."""
    host, colon, port = target.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isdigit() and 0 < int(port) < 1 << 16):
        raise usage_error(f"{option} is {target!r}; give HOST:PORT of a coordinator")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except socket.gaierror as error:
        raise usage_error(f"{option} is {target!r}; the host is unknown: {error.strerror}") from None
    except OSError as error:
        raise usage_error(f"{option} is {target!r}; no way leads there: {error.strerror}") from None
