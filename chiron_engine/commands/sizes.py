"""Amounts of memory, as people write them."""

from __future__ import annotations

import re

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)
_BY_LOWER = {name.lower(): factor for name, factor in UNITS.items()}


def parse_size(text: str) -> int:
    """`512MiB`, `1.5 GiB`, `2GB` or `0` as a number of bytes.

    Raises ValueError; a bare number other than 0 is refused, since some tools mean GiB by it and
    others bytes.
    """
    match = _FORM.fullmatch(text.strip())
    number, unit = (match[1], match[2].lower()) if match else ("", "")
    if number and float(number) == 0:
        return 0
    if unit not in _BY_LOWER:
        raise ValueError(f"{text!r} is no amount of memory; write it with a unit, as 512MiB or 4GiB")
    return int(float(number) * _BY_LOWER[unit])


def format_size(count: float) -> str:
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count >= UNITS[unit]:
            return f"{count / UNITS[unit]:.1f} {unit}"
    return f"{int(count)} B"
