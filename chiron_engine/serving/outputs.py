"""What comes back for a request: its tokens, their text, why it ended and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chiron_engine.gateway.detokenizer import Detokenizer
from chiron_engine.gateway.output_text import OutputText
from chiron_engine.policy.iteration.plan import TokenLogprobs
from chiron_engine.policy.iteration.request import FinishReason, Request


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Milliseconds from the call. queue_ms: until the first step that ran the request.
    mean_itl_ms, max_itl_ms: gaps between tokens, 0 with fewer than two."""

    ttft_ms: float
    mean_itl_ms: float
    max_itl_ms: float
    total_ms: float
    queue_ms: float
    preemptions: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One finished request. `token_ids` includes the end token or the tokens of a stop string;
    `text` has neither. finish_reason: stop, length, abort or error. logprobs: of each token, where
    they were asked for; prompt_logprobs: of each of the prompt but the first."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    timing: RequestTiming
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


class OutputCollector:
    """Turns the tokens of one request into text and, at the end, a RequestOutput."""

    def __init__(self, request: Request, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string."""
        self.request = request
        self._text = OutputText(detokenizer, stop, request.sampling.min_tokens)
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if request.sampling.logprobs is None else []
        self._prompt_logprobs: list[TokenLogprobs] | None = None
        if request.sampling.prompt_logprobs is not None:
            self._prompt_logprobs = []
        self._pieces: list[str] = []
        self._first = self._last = request.arrival
        self._max_gap = 0.0

    @property
    def stopped(self) -> bool:
        """Whether a stop string came: the request has to be aborted, its further tokens are moot."""
        return self._text.is_stopped

    def add(self, token_id: int, now: float, logprobs: TokenLogprobs | None = None) -> str:
        """Take the next token; the text it completes, up to a stop string."""
        if self._token_ids:
            self._max_gap = max(self._max_gap, now - self._last)
        else:
            self._first = now
        self._last = now
        self._token_ids.append(token_id)
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
        return self._show(self._text.feed(token_id))

    def add_prompt(self, logprobs: list[TokenLogprobs]) -> None:
        """Of the prompt's tokens, before the first of the output."""
        self._prompt_logprobs = logprobs

    def finish(self, now: float) -> tuple[str, RequestOutput]:
        """The text that was held back, and the whole output."""
        rest = self._show(self._text.finish())
        reason = FinishReason.STOP if self.stopped else self.request.finish_reason or FinishReason.ABORT
        output = RequestOutput(
            prompt_token_ids=list(self.request.prompt_ids),
            token_ids=self._token_ids,
            text="".join(self._pieces),
            finish_reason=reason.value,
            timing=self._timing(now),
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
        )
        return rest, output

    def _show(self, text: str) -> str:
        self._pieces.append(text)
        return text

    def _timing(self, now: float) -> RequestTiming:
        request, count = self.request, len(self._token_ids)
        scheduled = request.first_scheduled if request.first_scheduled is not None else now
        return RequestTiming(
            ttft_ms=1e3 * (self._first - request.arrival),
            mean_itl_ms=1e3 * (self._last - self._first) / (count - 1) if count > 1 else 0.0,
            max_itl_ms=1e3 * self._max_gap,
            total_ms=1e3 * (now - request.arrival),
            queue_ms=1e3 * (scheduled - request.arrival),
            preemptions=request.num_preempted,
            cached_tokens=request.num_cached_tokens,
        )
