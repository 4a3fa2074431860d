"""Step times read from tables of measured kernels."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Curve = Sequence[tuple[int, float]]
"""(x, milliseconds) with x ascending."""

SHORTEST_CONTEXT = 128
SHORTEST_STEP_MS = 1e-3
NUM_SEGMENTS = 16
"""Contexts of 128 tokens x 2^0 ... 2^15: beyond any context length served."""


@dataclass(frozen=True, slots=True)
class StepTables:
    """Milliseconds of one step's parts, all layers.

    base: projections, all-reduces and small operations, by tokens in the step. lm_head: by rows
    sampled. decode_attention: by decoding requests, then by KV tokens of each, which double from
    SHORTEST_CONTEXT on; rows of many requests end where the KV no longer fits.
    prefill_attention: a whole prompt computed alone, by its tokens.
    """

    base: Curve
    lm_head: Curve
    decode_attention: Sequence[tuple[int, Sequence[float]]]
    prefill_attention: Curve

    def __post_init__(self) -> None:
        for name in ("base", "lm_head", "decode_attention", "prefill_attention"):
            places = [x for x, _ in getattr(self, name)]
            if not places or places != sorted(set(places)) or places[0] < 1:
                raise ValueError(f"{name} must hold rows at ascending positive places; it holds {places}")
        if any(not values for _, values in self.decode_attention):
            raise ValueError("decode_attention has a row without values")
        _check_times("base", [ms for _, ms in self.base], SHORTEST_STEP_MS)
        for name in ("lm_head", "prefill_attention"):
            _check_times(name, [ms for _, ms in getattr(self, name)], 0.0)
        _check_times("decode_attention", [ms for _, values in self.decode_attention for ms in values], 0.0)


def _check_times(name: str, times_ms: Sequence[float], least: float) -> None:
    for ms in times_ms:
        if not least <= ms < math.inf:
            raise ValueError(f"{name} holds {ms} ms; it must be finite and at least {least:g}")


class TableStepTimes:
    """t = base(n + P) + decode attention(n, K / n) + prefill attention(chunks) + lm_head(n).

    Linear between the points of the tables. A step's chunks are taken as one of P tokens that ends
    at the context C / P, or, where that is less than P, as whole prompts of that length: attention
    of [0, end) less that of [0, start). Where decode rows end below the KV capacity they go on with
    their last slope, and prompts longer than the last one cost attention with the square of their
    length; both are counted in `extrapolated`. Contexts under 128 cost what 128 cost.

    One evaluation takes 1 to 2 us: everything is laid out by number of requests at construction.
    """

    __slots__ = (
        "_attention_end",
        "_base",
        "_constants",
        "_decode",
        "_launch_s",
        "_measured",
        "_prompt_ends",
        "_prompt_pieces",
        "_slopes",
        "extrapolated",
        "kv_capacity_tokens",
        "max_model_len",
        "max_slots",
        "max_step_tokens",
    )

    def __init__(
        self, tables: StepTables, kv_capacity_tokens: int, max_slots: int, max_model_len: int
    ) -> None:
        most = tables.decode_attention[-1][0]
        if not 1 <= max_slots <= most:
            raise ValueError(f"max_slots is {max_slots}; the tables go from 1 to {most} requests")
        self.kv_capacity_tokens = kv_capacity_tokens
        self.max_slots = max_slots
        self.max_model_len = max_model_len
        self.max_step_tokens = tables.base[-1][0]
        self.extrapolated = 0
        self._base = array("d", _seconds_at_integers(tables.base, self.max_step_tokens))
        lm_head = _seconds_at_integers(tables.lm_head, max_slots)
        self._decode = array("d", (b + h for b, h in zip(self._base, lm_head, strict=False)))
        self._base = array("d", (b + lm_head[1] for b in self._base))
        rows = _decode_rows(tables.decode_attention)
        self._constants, self._slopes, self._measured = _lines_by_requests(rows, max_slots)
        self._attention_end = tables.prefill_attention[-1][0]
        self._launch_s, self._prompt_ends, self._prompt_pieces = _prompt_attention(
            tables.prefill_attention, max_model_len
        )

    def seconds(self, requests: int, kv_tokens: int, prompt_tokens: int, prompt_context: int) -> float:
        """Raises ValueError beyond max_slots, a step's tokens or the context length. kv_tokens: sum of
        what the requests attend to, which exceeds the KV capacity where they share prefixes."""
        if not requests:
            return self._prefill(0, prompt_tokens, prompt_context) if prompt_tokens else 0.0
        context = kv_tokens / requests
        if requests > self.max_slots or context > self.max_model_len:
            raise ValueError(
                f"{requests} requests with {kv_tokens} KV tokens; this profile holds {self.max_slots} "
                f"requests of {self.max_model_len} tokens"
            )
        segment = (kv_tokens // requests).bit_length() - 7
        if segment < 0:
            segment = 0
        if context > self._measured[requests] or kv_tokens > self.kv_capacity_tokens:
            self.extrapolated += 1
        attention = self._constants[requests][segment] + self._slopes[requests][segment] * context
        if prompt_tokens:
            step = self._prefill(requests, prompt_tokens, prompt_context)
            return step + attention + self._decode[requests] - self._base[requests]
        return self._decode[requests] + attention

    def _prefill(self, requests: int, tokens: int, prompt_context: int) -> float:
        """Everything but the decode attention of a step with prompt chunks, with the head of one row."""
        if requests + tokens > self.max_step_tokens:
            raise ValueError(
                f"{requests + tokens} tokens in a step; this profile takes {self.max_step_tokens}"
            )
        end = prompt_context / tokens
        if end > self._attention_end:
            self.extrapolated += 1
        base = self._base[requests + tokens] + self._launch_s
        if end <= tokens:
            return base + tokens / end * self._prompt_s(end)
        return base + self._prompt_s(end) - self._prompt_s(end - tokens)

    def _prompt_s(self, tokens: float) -> float:
        """Attention of a whole prompt, beyond what any attention of prompts takes."""
        if tokens > self.max_model_len:
            raise ValueError(f"a context of {tokens:.0f} tokens; this profile goes to {self.max_model_len}")
        constant, slope = self._prompt_pieces[bisect_right(self._prompt_ends, tokens) - 1]
        return constant + slope * tokens


def _seconds_at_integers(curve: Curve, last: int) -> list[float]:
    """Values at 0, 1, ..., last, interpolated; below the first point its value holds."""
    values = [curve[0][1] / 1e3] * (curve[0][0] + 1)
    for (x0, y0), (x1, y1) in pairwise(curve):
        values += [(y0 + (y1 - y0) * (x - x0) / (x1 - x0)) / 1e3 for x in range(x0 + 1, x1 + 1)]
    if len(values) <= last:
        raise ValueError(f"a table ends at {curve[-1][0]}; it must reach {last}")
    return values[: last + 1]


def _decode_rows(rows: Sequence[tuple[int, Sequence[float]]]) -> list[tuple[int, list[float], int]]:
    """(requests, seconds at NUM_SEGMENTS contexts, last measured context) of each row.

    A row goes on with its last slope. A row of one point takes the slope per KV token of the row
    before it.
    """
    extended = []
    slope_per_kv = 0.0
    for requests, row in rows:
        values = [ms / 1e3 for ms in row]
        if len(values) > 1:
            width = SHORTEST_CONTEXT << (len(values) - 2)
            slope_per_kv = max(0.0, values[-1] - values[-2]) / (width * requests)
        measured = SHORTEST_CONTEXT << (len(values) - 1)
        for place in range(len(values), NUM_SEGMENTS):
            width = SHORTEST_CONTEXT << (place - 1)
            values.append(values[-1] + slope_per_kv * requests * width)
        extended.append((requests, values, measured))
    return extended


def _lines_by_requests(
    rows: list[tuple[int, list[float], int]], max_slots: int
) -> tuple[list[array[float]], list[array[float]], list[int]]:
    """For each number of requests from 0: constant and slope in the mean context on each segment
    between contexts, and the context up to which both rows around it were measured."""
    constants: list[array[float]] = [array("d")]
    slopes: list[array[float]] = [array("d")]
    measured = [0]
    upper = 0
    for requests in range(1, max_slots + 1):
        while rows[upper][0] < requests:
            upper += 1
        n1, high, end1 = rows[upper]
        n0, low, end0 = rows[upper - 1] if upper and n1 != requests else rows[upper]
        share = (requests - n0) / (n1 - n0) if n1 != n0 else 0.0
        values = [a + (b - a) * share for a, b in zip(low, high, strict=True)]
        widths = [SHORTEST_CONTEXT << place for place in range(NUM_SEGMENTS - 1)]
        slope = [(b - a) / w for a, b, w in zip(values, values[1:], widths, strict=False)]
        constant = [v - s * w for v, s, w in zip(values, slope, widths, strict=False)]
        constants.append(array("d", [values[0], *constant]))
        slopes.append(array("d", [0.0, *slope]))
        measured.append(min(end0, end1))
    return constants, slopes, measured


def _prompt_attention(curve: Curve, longest: int) -> tuple[float, list[float], list[tuple[float, float]]]:
    """Launch time, where the pieces begin, and (constant, slope) of each, for prompts of any length.

    The launch is the least any prompt takes; above it a longer prompt never takes less.
    """
    launch = min(ms for _, ms in curve) / 1e3
    points = [(0.0, 0.0)]
    for tokens, ms in curve:
        points.append((float(tokens), max(points[-1][1], ms / 1e3 - launch)))
    last, last_s = points[-1]
    while points[-1][0] < longest:
        further = points[-1][0] * 1.25
        points.append((further, last_s * (further / last) ** 2))
    pieces = []
    for (x0, y0), (x1, y1) in pairwise(points):
        slope = (y1 - y0) / (x1 - x0)
        pieces.append((y0 - slope * x0, slope))
    return launch, [x for x, _ in points[:-1]], pieces
