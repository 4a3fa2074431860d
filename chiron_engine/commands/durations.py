"""Durations and other quantities, as people write them on a command line."""

from __future__ import annotations

import math
import re

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_FORM = re.compile(r"([+-]?[0-9.]+(?:e[+-]?[0-9]+)?|[+-]?nan|[+-]?inf)\s*([a-z]*)", re.ASCII | re.IGNORECASE)


def parse_duration(text: str, bare_unit: str = "s") -> float:
    """`45`, `200ms`, `1.5h` as seconds; a bare number is in `bare_unit`.

    Raises ValueError for what is no finite number of at least 0 with a known unit.
    """
    match = _FORM.fullmatch(text.strip())
    unit = (match[2] or bare_unit).lower() if match else ""
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if unit not in UNITS or not math.isfinite(number) or number < 0:
        raise ValueError(f"{text!r} is no duration; write it as 45, 200ms, 10s, 5min or 1.5h")
    return number * UNITS[unit]


def parse_positive(text: str) -> float:
    """A finite number over 0. Raises ValueError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{text!r} is not a number over 0")
    return number


def format_duration(seconds: float) -> str:
    """As `75 s`, `12 min 30 s` or `2 h 05 min`."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        whole, rest = divmod(round(seconds), 60)
        return f"{whole} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
