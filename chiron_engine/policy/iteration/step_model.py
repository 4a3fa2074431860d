"""How long a step takes, learned while the engine runs.

Recursive least squares on the linear model of `StepCosts` that forgets, so that the fit is a good one
near where the engine runs now, whatever the true curve looks like elsewhere.
"""

from __future__ import annotations

from .autoscaler_inputs import EngineCapacity
from .step_costs import StepCosts
from .step_stats import StepStats

DRIFT = 3e-4
"""Relative deviation by which a coefficient may change in a step. What the model remembers follows
from it: about 200 steps, as with a forgetting factor of 0.995, of what they vary in."""
LEAST_SHARE = 0.02
"""A coefficient that is zero drifts by this share of what the largest does."""

NOISE = 0.03
"""Relative deviation of a step from the model; the scale of the prior's certainty."""
PRIOR_DEVIATION = 0.3
"""Relative deviation of a coefficient from a prior that was fitted on the like of this machine."""

DECODE_STEPS = 16
PROMPT_STEPS = 8
"""Steps summed into one observation: the model is linear, so sums obey it too."""

DOUBT = 0.1
"""Relative deviation of a coefficient after something showed the fit to be wrong."""

SIZE = 5
MIN_STEPS = 8


class StepModel:
    """Fits seconds = coefficients . features, features (1, n, K, P, C) as in `StepCosts`.

    Residuals are relative (every observation is divided by its time), because noise is. The
    coefficients are kept non-negative by conditioning on those that would fall below zero being zero.
    Forgetting is by drift: coefficients are taken to wander, so their variance grows with every step
    and shrinks with what is observed. A forgetting factor would do the same while inputs vary, but
    multiplies without bound the variance of what they do not vary in; drift stops at the prior's.
    """

    __slots__ = (
        "_coefficients",
        "_covariance",
        "_decode_sums",
        "_initial",
        "_prompt_sums",
        "_scale",
        "base_s",
        "per_kv_token_s",
        "per_prompt_context_s",
        "per_prompt_token_s",
        "per_request_s",
        "steps",
    )

    def __init__(self, capacity: EngineCapacity, prior: StepCosts | None = None) -> None:
        # Features as shares of a full engine, so that coefficients are seconds of like size.
        self._scale = (
            1.0,
            float(capacity.max_slots),
            float(capacity.kv_capacity_tokens),
            float(capacity.max_step_tokens),
            float(capacity.max_step_tokens) * capacity.max_step_tokens,
        )
        self._coefficients = [0.0] * SIZE
        self._covariance: list[list[float]] = []
        self._initial: list[float] = []
        self._decode_sums = [0.0] * 4
        self._prompt_sums = [0.0] * 6
        self.steps = 0
        """Steps taken in so far."""
        self.base_s = self.per_request_s = self.per_kv_token_s = 0.0
        self.per_prompt_token_s = self.per_prompt_context_s = 0.0
        if prior is not None:
            self._take_prior(prior)

    @property
    def is_ready(self) -> bool:
        """Whether it has a prior, or enough steps of its own."""
        return self.base_s > 0.0 or self.per_request_s > 0.0 or self.per_kv_token_s > 0.0

    @property
    def costs(self) -> StepCosts | None:
        if not self.is_ready:
            return None
        return StepCosts(
            self.base_s,
            self.per_request_s,
            self.per_kv_token_s,
            self.per_prompt_token_s,
            self.per_prompt_context_s,
        )

    def seconds(self, n: float, kv_tokens: float, prompt_tokens: float, prompt_context: float) -> float:
        return (
            self.base_s
            + self.per_request_s * n
            + self.per_kv_token_s * kv_tokens
            + self.per_prompt_token_s * prompt_tokens
            + self.per_prompt_context_s * prompt_context
        )

    def observe(self, stats: StepStats, seconds: float) -> None:
        """Take in a step that took `seconds` (> 0). Steps with copies do not belong here."""
        self.steps += 1
        if stats.prefill_tokens:
            self._add_prompt_step(stats, seconds)
            return
        sums = self._decode_sums
        sums[0] += 1.0
        sums[1] += stats.decode_requests
        sums[2] += stats.kv_tokens
        sums[3] += seconds
        if sums[0] >= DECODE_STEPS or self.steps <= MIN_STEPS:
            self._update(sums[0], sums[1], sums[2], 0.0, 0.0, sums[3])
            self._decode_sums = [0.0] * 4

    def doubt(self) -> None:
        """Trust every coefficient less, so that what comes next counts more."""
        for index, value in enumerate(self._coefficients):
            row = self._covariance[index]
            if row[index] < self._initial[index]:
                row[index] += (DOUBT * value / NOISE) ** 2

    def _add_prompt_step(self, stats: StepStats, seconds: float) -> None:
        sums = self._prompt_sums
        sums[0] += 1.0
        sums[1] += stats.decode_requests
        sums[2] += stats.kv_tokens
        sums[3] += stats.prefill_tokens
        sums[4] += stats.prefill_context
        sums[5] += seconds
        if sums[0] >= PROMPT_STEPS or self.steps <= MIN_STEPS:
            self._update(*sums)
            self._prompt_sums = [0.0] * 6

    def _take_prior(self, prior: StepCosts) -> None:
        values = (
            prior.base_s,
            prior.per_request_s,
            prior.per_kv_token_s,
            prior.per_prompt_token_s,
            prior.per_prompt_context_s,
        )
        self._coefficients = [value * scale for value, scale in zip(values, self._scale, strict=True)]
        # A coefficient that the prior has at zero may turn out not to be: it gets some room too.
        floor = 0.1 * max(self._coefficients)
        deviations = [PRIOR_DEVIATION * max(value, floor) / NOISE for value in self._coefficients]
        self._set_covariance([deviation * deviation for deviation in deviations])
        self._publish()

    def _take_weak_prior(self, seconds: float) -> None:
        """Nothing is known but the time of one step: each coefficient may be many times that."""
        deviations = [seconds, 4 * seconds, 4 * seconds, 16 * seconds, 16 * seconds]
        self._set_covariance([(deviation / NOISE) ** 2 for deviation in deviations])

    def _set_covariance(self, diagonal: list[float]) -> None:
        self._initial = diagonal
        self._covariance = [
            [diagonal[row] if row == column else 0.0 for column in range(SIZE)] for row in range(SIZE)
        ]

    def _update(
        self, count: float, n: float, kv: float, prompt: float, context: float, seconds: float
    ) -> None:
        """One observation: `count` steps whose features and times add up to these."""
        if not self._covariance:
            self._take_weak_prior(seconds / count)
        root = count**0.5
        scale, weight = self._scale, root / seconds
        # In units of the observed time; the mean of `count` steps has 1 / count of the variance.
        x0, x1, x2 = count * weight, n / scale[1] * weight, kv / scale[2] * weight
        x3, x4 = prompt / scale[3] * weight, context / scale[4] * weight
        rows = self._covariance
        g = [r[0] * x0 + r[1] * x1 + r[2] * x2 + r[3] * x3 + r[4] * x4 for r in rows]
        spread = x0 * g[0] + x1 * g[1] + x2 * g[2] + x3 * g[3] + x4 * g[4]
        if not spread > 0.0:
            self._set_covariance(self._initial)
            return
        theta = self._coefficients
        error = root - (x0 * theta[0] + x1 * theta[1] + x2 * theta[2] + x3 * theta[3] + x4 * theta[4])
        gain = error / (1.0 + spread)
        self._coefficients = [value + gain * along for value, along in zip(theta, g, strict=True)]
        self._shrink_covariance(g, spread)
        self._drift(count)
        self._keep_non_negative()
        self._publish()

    def _shrink_covariance(self, g: list[float], spread: float) -> None:
        """By what was observed: g = covariance x and spread = x' covariance x of the features x."""
        for row, along in zip(self._covariance, g, strict=True):
            factor = along / (1.0 + spread)
            row[0] -= factor * g[0]
            row[1] -= factor * g[1]
            row[2] -= factor * g[2]
            row[3] -= factor * g[3]
            row[4] -= factor * g[4]

    def _drift(self, count: float) -> None:
        """Grow the variance of each coefficient by what it may have changed in `count` steps, up to
        what it was before anything was known."""
        theta = self._coefficients
        least = LEAST_SHARE * max(theta)
        for index, row in enumerate(self._covariance):
            variance = row[index]
            if variance < self._initial[index]:
                row[index] = variance + count * (DRIFT / NOISE * max(theta[index], least)) ** 2

    def _keep_non_negative(self) -> None:
        """Set negative coefficients to zero, the most negative first, and move the others by what that
        says of them, so that the fit to what was observed suffers least. What is zero stays so."""
        theta = self._coefficients
        rows = self._covariance
        while (lowest := min(theta)) < 0.0:
            index = theta.index(lowest)
            given = rows[index]
            spread = given[index]
            if not spread > 0.0:
                self._coefficients = [max(0.0, value) for value in theta]
                return
            ratios = [value / spread for value in given]
            theta = [value - lowest * ratio for value, ratio in zip(theta, ratios, strict=True)]
            theta[index] = 0.0
            rows = [
                [value - given[i] * ratio for value, ratio in zip(rows[i], ratios, strict=True)]
                for i in range(SIZE)
            ]
            # Exactly, not but for rounding: a later step must not move it again.
            rows[index] = [0.0] * SIZE
            for row in rows:
                row[index] = 0.0
        self._coefficients = theta

    def _publish(self) -> None:
        theta, scale = self._coefficients, self._scale
        self.base_s = theta[0]
        self.per_request_s = theta[1] / scale[1]
        self.per_kv_token_s = theta[2] / scale[2]
        self.per_prompt_token_s = theta[3] / scale[3]
        self.per_prompt_context_s = theta[4] / scale[4]
