"""What the store is told of a line that ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import engine_pb2, inference_pb2, types_pb2

from .batch_line import BatchLine
from .batch_store import BatchStore


class BatchText(Protocol):
    """What text there is to a request, and what is kept of its output. Called from several threads."""

    def watcher(self, request: inference_pb2.GenerateRequest) -> Callable[[Sequence[int]], bool] | None: ...

    def output(
        self, request: inference_pb2.GenerateRequest, tokens: Sequence[int], finished: engine_pb2.Finished
    ) -> inference_pb2.GenerateChunk: ...


def outcome(
    line: BatchLine, stream: TokenStream, text: BatchText, now: float
) -> Callable[[BatchStore], bool]:
    """How it ended: done or failed; else it is given back with its tokens, which ends it where it was to
    be stopped."""
    line_id = line.pending.line_id
    failure, finished = stream.failure, stream.finished
    was_aborted = finished is not None and finished.reason == types_pb2.FINISH_REASON_ABORT

    def report(store: BatchStore, attempt: int) -> object:
        if failure is not None and failure.error_code != "draining":
            code = failure.error_code or failure.code.name.lower()
            return store.fail(line_id, attempt, code, failure.message, now)
        if finished is None or (was_aborted and not line.is_stopped):
            return store.requeue(line_id, attempt, now, stream.tokens)
        # In the store's thread: a long output takes milliseconds to become text.
        output = text.output(line.request, stream.tokens, finished).SerializeToString()
        return store.finish(line_id, attempt, output, now)

    return reporting(line, report, now)


def reporting(
    line: BatchLine, report: Callable[[BatchStore, int], object], now: float
) -> Callable[[BatchStore], bool]:
    """An operation that reports of the line's attempt. Where the line is evicted, as far as the store
    knows, it has gone on since: it is claimed again, and reported of then. A line that has its end is
    neither running nor to be claimed, and keeps it."""

    def operation(store: BatchStore) -> bool:
        if report(store, line.attempt):
            return True
        return claim_again(store, line, now) and bool(report(store, line.attempt))

    return operation


def claim_again(store: BatchStore, line: BatchLine, now: float) -> bool:
    """In the store's thread, so that whatever is reported next names the new attempt. Should the
    transaction be undone, that attempt is unknown to the store, and reporting claims the line again."""
    claims = store.claim([line.pending.line_id], now)
    for claim in claims:
        line.attempt = claim.attempt
    return bool(claims)
