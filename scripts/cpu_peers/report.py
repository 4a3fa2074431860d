"""What is said of a comparison: medians, ratios, a table for a page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

Rates = Mapping[int, float]  # output tokens/s by requests at once


def medians(passes: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Of the passes of each load; a load without a pass is left out."""
    return {requests: statistics.median(rates) for requests, rates in passes.items() if rates}


def ratios(ours: Rates, peers: Mapping[str, Rates]) -> dict[str, dict[int, float]]:
    """How many times the peer's output tokens/s ours are, where both were measured."""
    return {
        name: {requests: ours[requests] / rate for requests, rate in rates.items() if requests in ours}
        for name, rates in peers.items()
    }


def table(titles: Mapping[str, str], rates: Mapping[str, Rates], ours: str, loads: Sequence[int]) -> str:
    """Markdown: a row for each load, a column for each engine in the order of `titles`; behind each
    peer's figure how many times that ours is. A dash where there is none."""
    lines = [
        "| requests at once | " + " | ".join(titles.values()) + " |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for requests in loads:
        cells = [_cell(name, rates, ours, requests) for name in titles]
        lines.append(f"| {requests} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, rates: Mapping[str, Rates], ours: str, requests: int) -> str:
    rate = rates.get(name, {}).get(requests)
    if rate is None:
        return "-"
    reference = rates.get(ours, {}).get(requests)
    if name == ours or reference is None:
        return f"{rate:.0f}"
    return f"{rate:.0f} ({reference / rate:.2f}x)"
