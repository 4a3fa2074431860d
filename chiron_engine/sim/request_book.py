"""What becomes of each request of a simulation: who is still in the fleet, and the columns of those
that have left it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from chiron_engine.policy.iteration.request import Slo, SloClass

from .attainment import interactive_attained
from .run_result import Outcome, RequestColumns


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request in the fleet, wherever it stands. Its true length is known here and to the
    executor of the simulation alone.

    output_tokens: those it will have. produced: those it had when it last left an engine; left:
    those that its present stay on an engine brings. last_token: when the last token before an
    interruption of the stream came; resumed_at: when the first one after it came, where that was on
    the same engine. late: late gaps of the parts of the stream that have ended.
    """

    request_id: int
    slo: Slo
    arrival: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    keys: Sequence[Hashable]
    produced: int = 0
    left: int = 0
    first_token: float | None = None
    last_token: float | None = None
    resumed_at: float | None = None
    late: int = 0
    evictions: int = 0

    @property
    def produced_before_stay(self) -> int:
        return self.output_tokens - self.left

    @property
    def is_interactive(self) -> bool:
        return self.slo.slo_class is SloClass.INTERACTIVE


class RequestBook:
    """Requests by id, and what is known of them once they are served or rejected.

    rpc_delay_s: from an engine's commit to the arrival of its tokens.
    """

    def __init__(self, num_requests: int, rpc_delay_s: float) -> None:
        nothing = array("d", [math.nan])
        self.columns = RequestColumns(
            outcome=array("b", bytes(num_requests)),
            first_token_s=nothing * num_requests,
            last_token_s=nothing * num_requests,
            late_gaps=array("i", [0]) * num_requests,
            evictions=array("i", [0]) * num_requests,
            served=array("b", bytes(num_requests)),
            output_tokens=array("i", [0]) * num_requests,
        )
        self.live: dict[int, LiveRequest] = {}
        self.unserved = num_requests
        self.last_served_s = 0.0
        self.ended = 0
        self.attained = 0
        self._rpc_delay_s = rpc_delay_s

    def arrive(self, live: LiveRequest) -> None:
        self.live[live.request_id] = live

    def finish(self, live: LiveRequest, first_token: float, now: float, late: int) -> None:
        """The engine committed its last token. A request that is served twice shows in `served`."""
        row, columns = live.request_id, self.columns
        columns.served[row] += 1
        if self.live.pop(row, None) is None:
            return
        first, last = first_token + self._rpc_delay_s, now + self._rpc_delay_s
        columns.outcome[row] = Outcome.FINISHED
        columns.first_token_s[row] = first
        columns.last_token_s[row] = last
        columns.late_gaps[row] = late
        columns.evictions[row] = live.evictions
        columns.output_tokens[row] = live.output_tokens
        self.unserved -= 1
        self.last_served_s = max(self.last_served_s, last)
        if live.is_interactive:
            self.ended += 1
            self.attained += interactive_attained(
                live.slo, live.arrival, first, last, live.output_tokens, late
            )

    def reject(self, request_id: int, now: float) -> None:
        live = self.live.pop(request_id)
        self.columns.outcome[request_id] = Outcome.REJECTED
        self.columns.evictions[request_id] = live.evictions
        self.unserved -= 1
        self.last_served_s = max(self.last_served_s, now)
        self.ended += live.is_interactive

    def take_sample(self) -> tuple[int, int]:
        """(attained, ended): interactive requests that ended since the last call."""
        taken = (self.attained, self.ended)
        self.attained = self.ended = 0
        return taken
