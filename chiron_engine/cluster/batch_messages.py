"""The batch store's records as messages of the Batch service."""

from __future__ import annotations

from chiron_engine.rpc.v1 import batch_pb2, inference_pb2

from .batch_records import Batch, BatchStatus, LineResult, LineState

STATUSES = {
    BatchStatus.IN_PROGRESS: batch_pb2.BATCH_STATUS_IN_PROGRESS,
    BatchStatus.CANCELLING: batch_pb2.BATCH_STATUS_CANCELLING,
    BatchStatus.COMPLETED: batch_pb2.BATCH_STATUS_COMPLETED,
    BatchStatus.EXPIRED: batch_pb2.BATCH_STATUS_EXPIRED,
    BatchStatus.CANCELLED: batch_pb2.BATCH_STATUS_CANCELLED,
}
STATES = {
    LineState.QUEUED: batch_pb2.LINE_STATE_QUEUED,
    LineState.RUNNING: batch_pb2.LINE_STATE_RUNNING,
    LineState.EVICTED: batch_pb2.LINE_STATE_EVICTED,
    LineState.DONE: batch_pb2.LINE_STATE_DONE,
    LineState.FAILED: batch_pb2.LINE_STATE_FAILED,
    LineState.EXPIRED: batch_pb2.LINE_STATE_EXPIRED,
    LineState.CANCELLED: batch_pb2.LINE_STATE_CANCELLED,
}


def batch_info(batch: Batch) -> batch_pb2.BatchInfo:
    counts = {state.value: batch.counts[state] for state in LineState}
    return batch_pb2.BatchInfo(
        batch_id=batch.batch_id,
        name=batch.name,
        metadata=batch.metadata,
        status=STATUSES[batch.status],
        lines=batch_pb2.LineCounts(total=batch.total, **counts),
        created=batch.created,
        deadline=batch.deadline,
        expires_at=batch.expires_at,
        cancelled_at=batch.cancelled_at,
        finished_at=batch.finished_at,
    )


def line_result(result: LineResult) -> batch_pb2.LineResult:
    message = batch_pb2.LineResult(
        line_no=result.line_no,
        custom_id=result.custom_id,
        state=STATES[result.state],
        ended_at=result.ended_at,
    )
    if result.state is LineState.DONE:
        message.output.CopyFrom(inference_pb2.GenerateChunk.FromString(result.output))
    else:
        message.error.code = result.error_code
        message.error.message = result.error_message
    return message
