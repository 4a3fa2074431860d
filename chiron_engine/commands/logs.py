"""Logging of the long-running commands: to standard error, one line per event."""

from __future__ import annotations

import logging

LEVELS = ("debug", "info", "warning", "error")
# Its greetings come after the line to copy, which should stay the last one.
LINK_LOGGER = "chiron_engine.rpc.engine_link"


def set_up_logging(level: str) -> None:
    """level: one of LEVELS. Other people's libraries log warnings at most."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("chiron_engine").setLevel(level.upper())
    if level == "info":
        logging.getLogger(LINK_LOGGER).setLevel(logging.WARNING)
