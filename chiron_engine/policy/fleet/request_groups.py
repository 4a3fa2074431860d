"""Groups of batch requests with close deadlines (section 5: they keep scaling from following
single requests)."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .capacity import CapacityModel
from .messages import FleetRequest
from .output_estimate import OutputEstimate

if TYPE_CHECKING:
    from .instances import Tracked

SLACK_SHARE = 0.05


class Totals:
    """Sums over requests from which their work follows for any expected output. Integers, so that
    what is taken off leaves exactly what would be had it never been added."""

    __slots__ = ("count", "max_tokens", "prompt", "prompt_squares")

    def __init__(self) -> None:
        self.count = 0
        self.prompt = 0
        self.prompt_squares = 0
        self.max_tokens = 0

    def add(self, request: FleetRequest, sign: int = 1) -> None:
        known = request.prompt_tokens + request.produced
        self.count += sign
        self.prompt += sign * known
        self.prompt_squares += sign * known * known
        self.max_tokens += sign * (request.max_tokens - request.produced)

    def work_s(self, model: CapacityModel, outputs: OutputEstimate) -> float:
        """Sum of `CapacityModel.work_s` over the requests, all with the class's output lengths."""
        count = self.count
        if not count:
            return 0.0
        costs = model.batch_costs
        cap = self.max_tokens / count
        output = min(outputs.mean, cap)
        square = min(outputs.mean_square, cap * cap)
        context = self.prompt * output + 0.5 * count * square
        prefill = costs.per_prompt_token_s * self.prompt + costs.per_prompt_context_s * self.prompt_squares
        slot_share = max(context / model.kv_capacity, count * output / model.max_slots)
        work = prefill + costs.per_request_s * count * output + costs.per_kv_token_s * context
        time_share = work / model.room_s(model.batch_itl_s)
        return work + costs.base_s * max(slot_share, time_share)

    def variance(self, model: CapacityModel, outputs: OutputEstimate) -> float:
        """Variance of that work, from the variance of the output lengths, seconds squared."""
        if not self.count:
            return 0.0
        costs = model.batch_costs
        context = self.prompt / self.count + outputs.mean
        per_token = costs.per_request_s + (costs.per_kv_token_s + costs.base_s / model.kv_capacity) * context
        return self.count * outputs.variance * per_token**2


class RequestGroup:
    """Requests whose deadlines lie in [start, start + width), served first come, first served.

    queued: those without an instance. running: those on one; on average half their work is done.
    """

    __slots__ = ("due", "in_order", "number", "queued", "running", "start", "waiting", "width")

    def __init__(self, start: float, width: float, number: int) -> None:
        self.number = number
        self.start = start
        self.width = width
        self.due = math.inf
        self.waiting: deque[Tracked] = deque()
        self.in_order = False
        self.queued = Totals()
        self.running = Totals()

    @property
    def is_over(self) -> bool:
        return not (self.queued.count or self.running.count)


@dataclass(frozen=True, slots=True)
class GroupWork:
    """A group as the waiting time needs it. due: earliest deadline in it; work_s: seconds of one
    full instance left to do; service_s: time one of its requests takes once it runs."""

    due: float
    work_s: float
    variance: float
    service_s: float


def group_range(deadline: float, slack: float, lead_s: float) -> tuple[float, float]:
    """(start, width) of the group for a deadline: width max(L, 5 % of the slack), rounded down to
    L times a power of two so that ranges fall on one grid."""
    ratio = SLACK_SHARE * slack / lead_s
    width = lead_s * 2 ** int(math.log2(ratio)) if ratio > 1 else lead_s
    return math.floor(deadline / width) * width, width


def group_work(group: RequestGroup, model: CapacityModel, outputs: OutputEstimate) -> GroupWork:
    queued, running = group.queued, group.running
    count = queued.count + running.count
    prompt = (queued.prompt + running.prompt) / count
    return GroupWork(
        due=group.due,
        work_s=queued.work_s(model, outputs) + 0.5 * running.work_s(model, outputs),
        variance=queued.variance(model, outputs) + running.variance(model, outputs),
        service_s=model.service_s(prompt, outputs.mean, model.batch_itl_s),
    )
