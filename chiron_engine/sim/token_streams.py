"""The streams of tokens that one simulated engine sends: how many tokens, which gaps between them."""

from __future__ import annotations

from collections.abc import Sequence

from chiron_engine.policy.fleet.messages import MeasuredStep
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.step_stats import StepStats

from .request_book import LiveRequest
from .token_gaps import TokenGaps


class TokenStreams:
    """At a cost per step, per end and per interruption, not per token.

    The stream of an interactive request is in parts: a new one begins where it goes on after it was
    preempted on its engine, or after that engine was lost. The late gaps of a part, and the gap before
    it, are counted when it ends at the latest (`token_gaps`).

    output_tokens, batch_tokens: sent so far, of all requests and of batch requests. itl_s: gap before
    the tokens of the last step. last_commit: when that step was committed.
    """

    __slots__ = (
        "_gaps",
        "_interrupted",
        "_last_step",
        "batch_tokens",
        "itl_s",
        "last_commit",
        "output_tokens",
    )

    def __init__(self, gaps: TokenGaps) -> None:
        self.output_tokens = 0
        self.batch_tokens = 0
        self.itl_s = 0.0
        self.last_commit = 0.0
        self._gaps = gaps
        self._last_step: StepStats | None = None
        # Preempted here, with how many output tokens were planned before that.
        self._interrupted: dict[Request, int] = {}

    def on_step(self, stats: StepStats) -> None:
        """A step is committed."""
        self.last_commit = stats.time
        self.output_tokens += stats.decode_requests
        self.batch_tokens += stats.itl_batch
        self.itl_s = stats.itl_s
        if stats.decode_requests and not (stats.swap_in_blocks or stats.swap_out_blocks):
            self._last_step = stats
        if stats.itl_interactive:
            self._gaps.step(stats.time, stats.itl_s, stats.itl_interactive)

    def on_preempted(self, requests: Sequence[Request]) -> None:
        """The step about to be submitted takes these off the device. Batch requests have no gaps."""
        for request in requests:
            if live_of(request).is_interactive and request.first_token is not None:
                self._end_part(request, self.last_commit)
                self._interrupted[request] = request.num_planned_outputs

    def resume(self, step: int, now: float) -> None:
        """Begin the next part of those whose stream goes on with the last step before `step`, just
        committed."""
        if not self._interrupted:
            return
        for request in [r for r, before in self._interrupted.items() if r.outputs_at(step) > before]:
            live = live_of(request)
            assert live.last_token is not None
            live.late += self._gaps.interruption(now - live.last_token)
            live.resumed_at = now
            del self._interrupted[request]

    def finish(self, request: Request, now: float) -> None:
        """Its last token was sent."""
        self.output_tokens += 1
        if live_of(request).is_interactive:
            self._end_part(request, now)
        else:
            self.batch_tokens += 1
            note_first_token(request)

    def break_off(self, request: Request) -> None:
        """The engine is lost: what the last step sent is the last that came from it."""
        if live_of(request).is_interactive and request not in self._interrupted:
            self._end_part(request, self.last_commit)

    @property
    def last_step(self) -> MeasuredStep | None:
        """The last step that decoded and copied nothing, whose time is that of the model alone."""
        stats = self._last_step
        if stats is None:
            return None
        return MeasuredStep(
            stats.device_s,
            stats.decode_requests,
            stats.kv_tokens,
            stats.prefill_tokens,
            stats.prefill_context,
        )

    def _end_part(self, request: Request, last_token: float) -> None:
        """The stream ends or is interrupted after its token at `last_token`."""
        live = live_of(request)
        note_first_token(request)
        start = live.resumed_at
        if start is None:
            start = request.first_token
            if start is None:
                return
            if live.last_token is not None:
                live.late += self._gaps.interruption(start - live.last_token)
        live.late += self._gaps.late_between(start, last_token)
        live.last_token = last_token
        live.resumed_at = None


def live_of(request: Request) -> LiveRequest:
    """The simulation's record of an engine's request."""
    live: LiveRequest = request.client  # type: ignore[assignment]
    return live


def note_first_token(request: Request) -> None:
    """Keep when the first token of all its stays on engines was sent."""
    live = live_of(request)
    if live.first_token is None:
        live.first_token = request.first_token
