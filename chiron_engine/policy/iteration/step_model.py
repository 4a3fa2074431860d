"""How long a step takes, learned while the engine runs.

    t = b(n + P) + a n + k K + h [P > 0] + q C

with n decoding requests, K the sum of their KV lengths, P prompt tokens and C as in `StepCosts`. b, the
time of the matrix products, is a curve of stairs: kernels work in tiles, and one token more may cost as
much as a hundred. So b is learned at knots, and is linear between them.
"""

from __future__ import annotations

import math

from .autoscaler_inputs import EngineCapacity
from .step_costs import StepCosts
from .step_stats import StepStats

FINEST = 8
KNOTS_PER_OCTAVE = 8
"""Knots are at multiples of FINEST tokens up to 64, and from there at eight places in every octave, on
multiples of a power of two as tiles are: 64, 72, ..., 120, 128, 144, ..., 240, 256, 288, ..."""

NOISE = 0.03
"""Relative deviation of a step from the model."""
PRIOR_DEVIATION = 0.3
"""Relative deviation of a coefficient, at first."""
DRIFT = 3e-4
"""Relative deviation by which a coefficient may change in a step: what is observed all the time is
remembered for about NOISE / DRIFT steps, what is not for longer, and never gets less sure than at first."""
LEAST_SHARE = 0.02
"""What a, k, h and q make of a full step, at least, for how far they may be off."""
KNOWN = 0.2
"""A knot counts as seen once a step had this weight on it."""
STEEPEST_FALL = 0.9
"""The curve never falls to less than this part of what it was at fewer tokens."""
FRONTIER = 2
"""Knots beyond one seen that are given the benefit of the doubt."""

DRIFT_SQUARED = (DRIFT / NOISE) ** 2
WIDEST = (PRIOR_DEVIATION / NOISE) ** 2
DRIFT_STEPS = 16
"""Steps after which the drift of a, k, h and q is counted."""


def knot_below(tokens: int) -> int:
    """The highest knot at or below so many tokens."""
    shift = max(tokens.bit_length() - 4, 3)
    return KNOTS_PER_OCTAVE * (shift - 3) + (tokens >> shift)


def knot_place(knot: int) -> int:
    """Tokens at a knot."""
    if knot < KNOTS_PER_OCTAVE:
        return FINEST * knot
    octave, place = divmod(knot, KNOTS_PER_OCTAVE)
    return (KNOTS_PER_OCTAVE + place) << (octave + 2)


class StepModel:
    """A Kalman filter whose covariance is kept diagonal, so that a step updates what is active in it,
    two knots and four scalars, and nothing else. Errors are relative to the time observed, as noise is.
    """

    __slots__ = (
        "_anchor", "_last", "_most", "_per_context", "_per_kv", "_per_n", "_places", "_prior",
        "_scalar_variances", "_scalars", "_values", "_variances", "_widest", "steps",
    )  # fmt: skip

    def __init__(self, capacity: EngineCapacity, prior: StepCosts | None = None) -> None:
        self._most = most = capacity.max_step_tokens
        self._places = [knot_place(knot) for knot in range(knot_below(most) + 2)]
        # n, K, [P > 0] and C count as shares of a full step, so that scalars are seconds of like size.
        self._per_n = 1.0 / capacity.max_slots
        self._per_kv = 1.0 / capacity.kv_capacity_tokens
        self._per_context = 1.0 / most**2
        self._scalars = (0.0, 0.0, 0.0, 0.0)
        """a, k, h and q."""
        self._prior: list[float] = []
        """b at the knots as it was thought to be at first."""
        self._values: list[float] = []
        self._variances: list[float] = []
        """Over NOISE squared."""
        self._scalar_variances = self._widest = self._scalars
        """Now, and at first."""
        self._last = [0] * len(self._places)
        """Steps taken in when the knot was last seen; 0 for never."""
        self._anchor = [-1] * len(self._places)
        """The highest knot seen at or below each."""
        self.steps = 0
        if prior is not None:
            each = prior.per_prompt_token_s
            self._scalars = (
                max(0.0, prior.per_request_s - each) / self._per_n,
                prior.per_kv_token_s / self._per_kv,
                0.0,
                prior.per_prompt_context_s / self._per_context,
            )
            least = PRIOR_DEVIATION * prior.base_s
            deviations = [PRIOR_DEVIATION * max(value, least) for value in self._scalars]
            self._begin([prior.base_s + each * place for place in self._places], deviations)

    @property
    def is_ready(self) -> bool:
        """Whether it has a prior, or has seen a step."""
        return bool(self._values)

    @property
    def per_request_s(self) -> float:
        return self._scalars[0] * self._per_n

    @property
    def per_kv_token_s(self) -> float:
        return self._scalars[1] * self._per_kv

    @property
    def prompt_step_s(self) -> float:
        """What a step with any prompt tokens takes longer."""
        return self._scalars[2]

    @property
    def per_prompt_context_s(self) -> float:
        return self._scalars[3] * self._per_context

    def seconds(self, n: int, kv_tokens: float, prompt_tokens: int, prompt_context: float) -> float:
        """Of a step of so much; 0 where nothing is known yet."""
        if not self._values:
            return 0.0
        knot = min(knot_below(n + prompt_tokens), len(self._places) - 2)
        low, high = self._places[knot], self._places[knot + 1]
        share = (n + prompt_tokens - low) / (high - low)
        seconds = (
            (1.0 - share) * self._knot_s(knot)
            + share * self._knot_s(knot + 1)
            + self.per_request_s * n
            + self.per_kv_token_s * kv_tokens
        )
        if prompt_tokens:
            seconds += self.prompt_step_s + self.per_prompt_context_s * prompt_context
        return seconds

    def has_seen(self, tokens: int) -> bool:
        """Whether there were steps of about so many."""
        knot = knot_below(min(tokens, self._most))
        low, high = self._places[knot], self._places[knot + 1]
        share = (tokens - low) / (high - low)
        return (share > 1.0 - KNOWN or self._last[knot] > 0) and (share < KNOWN or self._last[knot + 1] > 0)

    def alone_s(self, kv_tokens: float) -> float:
        """Of a step in which one request decodes and nothing else happens; 0 where steps with few tokens
        were not seen."""
        return self.seconds(1, kv_tokens, 0, 0.0) if self._last[0] else 0.0

    def prompt_tokens_s(self, n: int, count: int) -> float:
        """Seconds that so many prompt tokens add to the matrix products of a step with n decoding."""
        return (
            self.seconds(n + count, 0.0, 0, 0.0) - self.seconds(n, 0.0, 0, 0.0) - self.per_request_s * count
        )

    def most_tokens(self, room_s: float, per_token_s: float, most: int) -> int:
        """The largest x up to `most` with b(x) + per_token_s x <= room_s, 0 where there is none.

        Smaller x may take longer: it looks past stairs. What was not seen for long may have changed,
        and what never was may be less than is thought: it counts for less by its deviation, so that it
        is tried now and then.
        """
        places = self._places
        knot = knot_below(most) + 1
        above, above_s = places[knot], self._hoped_s(knot) + per_token_s * places[knot]
        while knot:
            knot -= 1
            place = places[knot]
            seconds = self._hoped_s(knot) + per_token_s * place
            if seconds <= room_s:
                if above_s <= room_s:
                    return most
                return min(most, place + int((above - place) * (room_s - seconds) / (above_s - seconds)))
            above, above_s = place, seconds
        return 0

    def observe(self, stats: StepStats, seconds: float) -> float:
        """Take in a step that took `seconds` (> 0): what it was thought to take, 0 where there was no step
        of about so many tokens before. Steps with copies do not belong here.

        Each active coefficient i, of weight x_i, moves by the error times var_i x_i / spread, with
        spread = seconds^2 + sum of var_j x_j^2. Written out, as it runs on every step.
        """
        if not self._values:
            most = 4.0 * seconds
            self._begin([seconds] * len(self._places), [most, most, seconds, most])
        self.steps += 1
        n, prompt = stats.decode_requests, stats.prefill_tokens
        tokens = min(n + prompt, self._most)
        knot = knot_below(tokens)
        low = self._places[knot]
        x1 = (tokens - low) / (self._places[knot + 1] - low)
        x0 = 1.0 - x1
        was_seen = (x0 < KNOWN or self._see(knot)) & (x1 < KNOWN or self._see(knot + 1))
        values, variances = self._values, self._variances
        b0, b1 = values[knot], values[knot + 1]
        a, k, h, q = self._scalars
        var_a, var_k, var_h, var_q = self._scalar_variances
        x_a, x_k = n * self._per_n, stats.kv_tokens * self._per_kv
        g0, g1, g_a, g_k = variances[knot] * x0, variances[knot + 1] * x1, var_a * x_a, var_k * x_k
        expected = b0 * x0 + b1 * x1 + a * x_a + k * x_k
        spread = seconds * seconds + g0 * x0 + g1 * x1 + g_a * x_a + g_k * x_k
        if prompt:
            x_q = stats.prefill_context * self._per_context
            g_h, g_q = var_h, var_q * x_q
            expected += h + q * x_q
            spread += g_h + g_q * x_q
            gain = (seconds - expected) / spread
            h, q = h + gain * g_h, q + gain * g_q
            var_h, var_q = var_h - g_h * g_h / spread, var_q - g_q * g_q / spread
        else:
            gain = (seconds - expected) / spread
        least = LEAST_SHARE * seconds
        b0, b1, a, k = b0 + gain * g0, b1 + gain * g1, a + gain * g_a, k + gain * g_k
        values[knot], values[knot + 1] = b0 if b0 > least else least, b1 if b1 > least else least
        variances[knot] -= g0 * g0 / spread
        variances[knot + 1] -= g1 * g1 / spread
        self._scalars = (
            a if a > 0.0 else 0.0, k if k > 0.0 else 0.0, h if h > 0.0 else 0.0, q if q > 0.0 else 0.0,
        )  # fmt: skip
        self._scalar_variances = (var_a - g_a * g_a / spread, var_k - g_k * g_k / spread, var_h, var_q)
        if not self.steps % DRIFT_STEPS:
            self._drift_scalars(least)
        return expected if was_seen else 0.0

    def _begin(self, values: list[float], deviations: list[float]) -> None:
        self._prior, self._values = values, list(values)
        self._variances = [0.0] * len(values)
        a, k, h, q = ((deviation / NOISE) ** 2 for deviation in deviations)
        self._scalar_variances = self._widest = (a, k, h, q)

    def _knot_s(self, knot: int) -> float:
        """From a knot seen to one that is not the curve rises as it was thought to at first."""
        anchor = self._anchor[knot]
        if anchor == knot or anchor < 0:
            return self._values[knot]
        return self._values[anchor] + self._prior[knot] - self._prior[anchor]

    def _hoped_s(self, knot: int) -> float:
        """Less its deviation: where seen, that of the drift since; just beyond, that of a first guess."""
        if last := self._last[knot]:
            return self._values[knot] * (1.0 - min(PRIOR_DEVIATION, DRIFT * math.sqrt(self.steps - last)))
        value = self._knot_s(knot)
        anchor = self._anchor[knot]
        if anchor < 0 or knot > anchor + FRONTIER:
            return value
        return max((1.0 - PRIOR_DEVIATION) * value, STEEPEST_FALL * self._values[anchor])

    def _see(self, knot: int) -> bool:
        """A step has much of its weight on the knot. Whether one had before."""
        last = self._last[knot]
        self._last[knot] = self.steps
        if last:
            drift = DRIFT_SQUARED * (self.steps - last)
            self._variances[knot] += (drift if drift < WIDEST else WIDEST) * self._values[knot] ** 2
            return True
        value = self._values[knot] = self._knot_s(knot)
        self._anchor[knot:] = [max(knot, anchor) for anchor in self._anchor[knot:]]
        self._variances[knot] = WIDEST * value**2
        return False

    def _drift_scalars(self, least: float) -> None:
        """Let variances grow by what a, k, h and q may have changed in DRIFT_STEPS steps."""
        drift = DRIFT_STEPS * DRIFT_SQUARED
        a, k, h, q = (
            min(widest, variance + drift * max(value, least) ** 2)
            for widest, variance, value in zip(
                self._widest, self._scalar_variances, self._scalars, strict=True
            )
        )
        self._scalar_variances = (a, k, h, q)
