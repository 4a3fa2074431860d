"""The options of `chiron bench`, beside those of a workload and its objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .durations import parse_positive
from .option_tables import OptionTable
from .simulation_options import entry, parsed, positive_duration

REPLAY_OPTIONS: OptionTable = dict(
    (
        parsed("--rate-scale", None, "Multiply the rate of all arrivals.", parse_positive, "X"),
        entry("--requests", int | None, None, "Send the first N requests only.", min=1, metavar="N"),
        parsed("--timeout", None, "Give a request up after that (no limit).", positive_duration, "SECONDS"),
        entry(
            "--profile",
            str | None,
            None,
            "The server's instances, for --load and for an ITL SLO as 1.5x.",
            metavar="GPU/MODEL/tpN/precision",
        ),
    )
)


def check_scaling(options: Mapping[str, Any]) -> None:
    """Raises ValueError for ways to scale that exclude each other, and for what needs a profile."""
    loads = [flag for flag in ("load", "batch_load") if options[flag] is not None]
    if options["rate_scale"] is not None and loads:
        flag = loads[0].replace("_", "-")
        raise ValueError(f"--rate-scale and --{flag} both scale the arrivals; give one of them")
    needing = [f"--{flag.replace('_', '-')} {options[flag]:g}" for flag in loads]
    needing += [
        f"--{flag.replace('_', '-')} {options[flag]}"
        for flag in ("itl_slo", "batch_itl_slo")
        if options[flag].endswith("x")
    ]
    if needing and options["profile"] is None:
        raise ValueError(
            f"{needing[0]} depends on the kind of instance; say which with --profile, or use"
            " --rate-scale and milliseconds"
        )
    if options["profile"] is not None and not needing:
        raise ValueError(
            "--profile says nothing here; it goes with --load, --batch-load or an ITL SLO as 1.5x"
        )


def check_address(address: str) -> None:
    """Raises ValueError for what is not HOST:PORT."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"--address: {address!r} is no HOST:PORT, as 127.0.0.1:50051")
