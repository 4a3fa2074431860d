"""Expected output length of a class, learned from the requests that finished: mu and sigma of the
waiting time, and the output that u counts on."""

from __future__ import annotations

import math

PRIOR_SAMPLES = 4
MEMORY = 4096
BINS_PER_OCTAVE = 4


class OutputEstimate:
    """Moments of the output length, and what outputs that are already long still have to come.
    Old samples lose half their weight every 4,096 new ones."""

    def __init__(self, prior_tokens: float) -> None:
        self._weight = float(PRIOR_SAMPLES)
        self._sum = PRIOR_SAMPLES * prior_tokens
        # The prior is an exponential distribution: its mean square is twice its squared mean.
        self._square_sum = PRIOR_SAMPLES * 2.0 * prior_tokens**2
        self._since_decay = 0
        self._count_by_bin = [0.0] * (32 * BINS_PER_OCTAVE)
        self._sum_by_bin = [0.0] * (32 * BINS_PER_OCTAVE)
        self._moments()

    def observe(self, tokens: int) -> None:
        self._weight += 1.0
        self._sum += tokens
        self._square_sum += tokens * tokens
        place = _bin(tokens)
        self._count_by_bin[place] += 1.0
        self._sum_by_bin[place] += tokens
        self._since_decay += 1
        if self._since_decay >= MEMORY:
            self._decay()
        self._moments()

    def remaining(self, produced: int) -> float:
        """Mean of what outputs longer than `produced` still had to come."""
        if produced <= 0:
            return self.mean
        first = _bin(produced) + 1
        count = sum(self._count_by_bin[first:])
        if count < PRIOR_SAMPLES:
            return max(self.mean, 1.0)
        return max(1.0, sum(self._sum_by_bin[first:]) / count - produced)

    def _moments(self) -> None:
        self.mean = max(1.0, self._sum / self._weight)
        self.mean_square = self._square_sum / self._weight
        self.variance = max(0.0, self.mean_square - self.mean**2)

    def _decay(self) -> None:
        self._since_decay = 0
        self._weight *= 0.5
        self._sum *= 0.5
        self._square_sum *= 0.5
        self._count_by_bin = [0.5 * count for count in self._count_by_bin]
        self._sum_by_bin = [0.5 * total for total in self._sum_by_bin]


def _bin(tokens: int) -> int:
    return min(int(BINS_PER_OCTAVE * math.log2(max(tokens, 1))), 32 * BINS_PER_OCTAVE - 1)
