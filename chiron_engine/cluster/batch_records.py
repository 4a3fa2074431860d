"""What goes into the batch store and comes out of it. Times are wall time in Unix seconds."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class LineState(StrEnum):
    """QUEUED: never ran, or came back from an engine that was lost. EVICTED: handed back by its
    engine. The last four are ends."""

    QUEUED = "queued"
    RUNNING = "running"
    EVICTED = "evicted"
    DONE = "done"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        return self not in (LineState.QUEUED, LineState.RUNNING, LineState.EVICTED)


class BatchStatus(StrEnum):
    """EXPIRED and CANCELLED: ended, with at least one line that never ran to its end for that reason."""

    IN_PROGRESS = "in_progress"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class NewBatch:
    """deadline: when the whole should be complete; lines without one of their own have it.
    expires_at: when unfinished lines are given up; None never gives up."""

    batch_id: str
    name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    deadline: float | None = None
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class NewLine:
    """One request. request: its serialized message, which the store does not look into.
    ttft_slo_s, itl_slo_s: seconds. deadline: None takes the batch's. content: what the client sent,
    or a digest of it, where `request` is made of that and may differ the next time (by a drawn
    seed); a batch submitted again is known by it."""

    custom_id: str
    request: bytes
    prompt_tokens: int
    max_tokens: int
    ttft_slo_s: float
    itl_slo_s: float
    deadline: float | None = None
    content: bytes = b""


@dataclass(frozen=True, slots=True)
class PendingLine:
    """An unfinished line as the queue sees it: lengths, not tokens. `line_id` is unique among all
    lines of the store, for ever. produced: tokens it has, with which it resumes."""

    line_id: int
    batch_id: str
    line_no: int
    state: LineState
    prompt_tokens: int
    max_tokens: int
    ttft_slo_s: float
    itl_slo_s: float
    created: float
    deadline: float | None
    produced: int

    @property
    def place(self) -> tuple[float, int]:
        """Lines are run in this order: by deadline, or by when the first token is due where there is
        none."""
        due = self.created + self.ttft_slo_s if self.deadline is None else self.deadline
        return due, self.line_id


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run a line, and what to run. Whatever is reported of it names this attempt."""

    line_id: int
    attempt: int
    request: bytes
    produced: array[int]


@dataclass(frozen=True, slots=True)
class RunningLine:
    """A running line that is to be stopped."""

    line_id: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Progress:
    """All tokens that an attempt has produced, those of earlier attempts included."""

    line_id: int
    attempt: int
    produced: Iterable[int]


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """What a cancel or an expiry did. ended: lines that waited and now have their end.
    to_stop: lines that run; each has its end once `BatchStore.stopped` is told, or it finished."""

    ended: tuple[int, ...]
    to_stop: tuple[RunningLine, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """counts: lines by state, every state named. cancelled_at: when its cancel was asked for.
    finished_at: when its last line ended."""

    batch_id: str
    name: str
    metadata: Mapping[str, str]
    created: float
    deadline: float | None
    expires_at: float | None
    cancelled_at: float | None
    finished_at: float | None
    total: int
    counts: Mapping[LineState, int]

    @property
    def status(self) -> BatchStatus:
        if self.finished_at is None:
            return BatchStatus.IN_PROGRESS if self.cancelled_at is None else BatchStatus.CANCELLING
        if self.counts[LineState.CANCELLED]:
            return BatchStatus.CANCELLED
        return BatchStatus.EXPIRED if self.counts[LineState.EXPIRED] else BatchStatus.COMPLETED


@dataclass(frozen=True, slots=True)
class Submitted:
    """lines: as stored; empty where the batch was here already (`is_new` is False)."""

    batch: Batch
    lines: tuple[PendingLine, ...]
    is_new: bool


@dataclass(frozen=True, slots=True)
class LineResult:
    """How a line ended. output: bytes given to `finish`, empty for other ends, which have an
    error_code and an error_message instead."""

    line_no: int
    custom_id: str
    state: LineState
    output: bytes
    error_code: str
    error_message: str
    ended_at: float


@dataclass(frozen=True, slots=True)
class ResultPage:
    """next_after: the `after` of the next page, None where this is the last."""

    results: tuple[LineResult, ...]
    next_after: int | None


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Four bytes a token, little-endian. Raises OverflowError for ids outside of 32 bits."""
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(raw: bytes) -> array[int]:
    tokens = array("I", raw)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens
