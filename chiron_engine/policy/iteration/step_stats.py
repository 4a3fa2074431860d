"""What one step did and took."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class StepStats:
    """One committed step. Durations and times in seconds, on the engine's clock.

    kv_tokens: sum of the KV lengths that decoding requests attend to. prefill_context: sum over
    prompt chunks of count x KV length at the chunk's end. itl_s: gap since the last commit, the
    inter-token latency of every request that decoded in both steps; itl_interactive and itl_batch
    count them. submit_s: handing the plan over; wait_s: waiting for the result; device_s: what the
    executor says the step took. Those from `queued_tokens` tell a controller what waits: known tokens that
    waiting and prefilling requests still have to compute, and those of interactive ones; when the
    first token of the most urgent interactive one is due (infinite without one); requests of each
    class in the engine. draft_requests: of those that decode, the ones with guesses; drafted_tokens:
    guesses computed, on top of a token each; accepted_tokens: guesses that held, accepted_batch_tokens
    those of batch requests.
    """

    step: int
    time: float
    prefill_tokens: int
    prefill_context: int
    decode_requests: int
    kv_tokens: int
    swap_out_blocks: int
    swap_in_blocks: int
    plan_s: float
    submit_s: float
    wait_s: float
    device_s: float
    commit_s: float
    graph: bool
    running: int
    waiting: int
    free_blocks: int
    finished: int
    preempted: int
    max_running: int
    token_budget: int
    itl_s: float
    itl_interactive: int
    itl_batch: int
    queued_tokens: int = 0
    queued_interactive_tokens: int = 0
    first_token_due: float = math.inf
    interactive_requests: int = 0
    batch_requests: int = 0
    draft_requests: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_batch_tokens: int = 0

    @property
    def host_s(self) -> float:
        """Time the step spent outside the executor."""
        return self.plan_s + self.commit_s
