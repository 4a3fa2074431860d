"""The options of commands that listen for clients: `chiron serve` and `chiron engine`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chiron_engine.config import GatewayConfig

from .exits import usage_errors
from .logs import LEVELS
from .option_tables import TableOption, choice, with_options

DEFAULTS = GatewayConfig()

SERVER_OPTIONS = {
    "host": TableOption("--host", str, DEFAULTS.host, {"help": "Address to listen on."}),
    "grpc_port": TableOption(
        "--grpc-port",
        int,
        DEFAULTS.grpc_port,
        {"help": "gRPC port (0: any free one).", "max": 65535, "min": 0},
    ),
    "drain_timeout_s": TableOption(
        "--drain-timeout",
        float,
        DEFAULTS.drain_timeout_s,
        {"help": "Seconds that running requests get after SIGTERM.", "min": 0.0},
    ),
    "reflection": TableOption("--grpc-reflection", bool, False, {"help": "Offer gRPC server reflection."}),
    "log_level": TableOption("--log-level", str, "info", {"help": "What to log.", **choice(LEVELS)}),
}

with_server_options = with_options("server", SERVER_OPTIONS, "Server")


def gateway_config(server: Mapping[str, Any], max_queued_requests: int) -> GatewayConfig:
    """Raises CommandError (usage) for a value outside its range."""
    values = {name: value for name, value in server.items() if name != "log_level"}
    with usage_errors():
        return GatewayConfig(**values, max_queued_requests=max_queued_requests)


def reachable(host: str, port: int) -> str:
    """The address at which a client on this machine reaches a server bound to `host`."""
    if host in ("", "0.0.0.0"):
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
