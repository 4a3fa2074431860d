"""What instances really deliver of batch work, against the step model (T of the waiting time)."""

from __future__ import annotations

import math

from .capacity import CapacityModel
from .instances import Instance
from .messages import Role

PRIOR_S = 60.0
"""Seconds of one instance that the step model's word weighs as much as."""


class BatchThroughput:
    """Work delivered per second while batch requests are queued, over the last `window_s`.

    rate: of one batch instance, as a share of one that never idles. spare_rate: of mixed
    instances, per unit of 1 - u. Time in which batch is evicted counts too. Without history both
    are 1, the step model's word.
    """

    def __init__(self, model: CapacityModel, window_s: float) -> None:
        self._model = model
        self._window_s = window_s
        self._work = {Role.BATCH: PRIOR_S, Role.MIXED: PRIOR_S}
        self._seconds = {Role.BATCH: PRIOR_S, Role.MIXED: PRIOR_S}
        self._finished_work = 0.0
        self._finished_tokens = 0.0

    @property
    def rate(self) -> float:
        return self._work[Role.BATCH] / self._seconds[Role.BATCH]

    @property
    def spare_rate(self) -> float:
        return self._work[Role.MIXED] / self._seconds[Role.MIXED]

    def request_finished(self, prompt_tokens: int, output_tokens: int) -> None:
        """Teaches how much work an output token of a batch request stands for."""
        self._finished_work += self._model.work_s(
            prompt_tokens, max(output_tokens, 1), self._model.batch_itl_s
        )
        self._finished_tokens += output_tokens

    def delivered(self, instance: Instance, tokens: int, seconds: float) -> None:
        """An instance that could have been full produced `tokens` for batch requests."""
        if instance.role not in self._work or not self._finished_tokens:
            return
        share = 1.0 if instance.role is Role.BATCH else max(0.0, 1.0 - instance.load)
        self._work[instance.role] += tokens * self._finished_work / self._finished_tokens
        self._seconds[instance.role] += share * seconds

    def forget_old(self, seconds: float) -> None:
        """Called every tick, so that the sums fade over the window."""
        kept = math.exp(-seconds / self._window_s)
        for role in self._work:
            self._work[role] = PRIOR_S + (self._work[role] - PRIOR_S) * kept
            self._seconds[role] = PRIOR_S + (self._seconds[role] - PRIOR_S) * kept
        self._finished_work *= kept
        self._finished_tokens *= kept
