"""What a run saw, in columns: bytes by request and by chunk of tokens, no objects."""

from __future__ import annotations

import math
from array import array

from chiron_engine.sim.run_result import Outcome

SHORT_OUTPUT = "output not of the length asked for"


class RequestLog:
    """Entry i of a request column is the request with that id. Times in seconds from the start of the
    run, NaN where it did not happen. A chunk is what one message brought: `chunk_tokens` tokens of
    request `chunk_request` at `chunk_s`; 16 bytes each. Chunks are in order of time."""

    __slots__ = (
        "cached_tokens",
        "chunk_request",
        "chunk_s",
        "chunk_tokens",
        "due_s",
        "ended_s",
        "errors",
        "outcome",
        "output_tokens",
        "preemptions",
        "sent_s",
    )

    def __init__(self, requests: int) -> None:
        never = array("d", [math.nan])
        none = array("i", [0])
        self.due_s = never * requests
        self.sent_s = never * requests
        self.ended_s = never * requests
        self.outcome = array("b", [Outcome.UNFINISHED]) * requests
        self.output_tokens = none * requests
        self.preemptions = none * requests
        self.cached_tokens = none * requests
        self.chunk_request = array("i")
        self.chunk_s = array("d")
        self.chunk_tokens = array("i")
        self.errors: dict[str, int] = {}

    def sent(self, request: int, due_s: float, now: float) -> None:
        self.due_s[request], self.sent_s[request] = due_s, now

    def tokens(self, request: int, now: float, count: int) -> None:
        self.output_tokens[request] += count
        self.chunk_request.append(request)
        self.chunk_s.append(now)
        self.chunk_tokens.append(count)

    def finished(self, request: int, now: float, preemptions: int, cached_tokens: int) -> None:
        self.ended_s[request] = now
        self.outcome[request] = Outcome.FINISHED
        self.preemptions[request] = preemptions
        self.cached_tokens[request] = cached_tokens

    def failed(self, request: int, now: float, error: str, *, rejected: bool) -> None:
        """rejected: the server said no before it gave a token; otherwise the request is lost."""
        self.ended_s[request] = now
        if rejected:
            self.outcome[request] = Outcome.REJECTED
        self.errors[error] = self.errors.get(error, 0) + 1
