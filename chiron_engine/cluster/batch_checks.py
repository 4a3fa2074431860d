"""What a batch may hold. Checked before anything of it is stored."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .batch_errors import BatchInvalid, BatchTooLarge
from .batch_records import NewBatch, NewLine

BATCH_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
MAX_NAME_BYTES = 256
MAX_CUSTOM_ID_BYTES = 256
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_BYTES = 64
MAX_METADATA_VALUE_BYTES = 512


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Sizes in bytes of serialized requests."""

    max_lines: int = 50_000
    max_line_bytes: int = 4 << 20
    max_batch_bytes: int = 200_000_000


def check_batch(batch: NewBatch, lines: Sequence[NewLine], limits: BatchLimits) -> None:
    """Everything about it that does not depend on the time. Raises BatchInvalid."""
    check_batch_id(batch.batch_id)
    _check_text("name", batch.name, MAX_NAME_BYTES)
    _check_metadata(batch)
    for name, value in (("deadline", batch.deadline), ("expires_at", batch.expires_at)):
        _check_finite(name, value)
    if not lines:
        raise BatchInvalid("the batch has no lines; it must have at least one")
    if len(lines) > limits.max_lines:
        raise BatchTooLarge(f"the batch has {len(lines)} lines; at most {limits.max_lines} are allowed")
    total_bytes = sum(len(line.request) for line in lines)
    if total_bytes > limits.max_batch_bytes:
        raise BatchTooLarge(
            f"the requests of the batch take {total_bytes} bytes; "
            f"at most {limits.max_batch_bytes} are allowed"
        )
    places: dict[str, int] = {}
    for place, line in enumerate(lines):
        _check_line(line, f"line {place}", limits)
        first = places.setdefault(line.custom_id, place)
        if first != place:
            raise BatchInvalid(
                f"lines {first} and {place} have the same custom_id, {shown(line.custom_id)}; "
                "each must have one of its own"
            )


def check_times(batch: NewBatch, lines: Sequence[NewLine], now: float) -> None:
    """Deadlines lie ahead. Raises BatchInvalid."""
    _check_ahead("deadline", batch.deadline, now)
    _check_ahead("expires_at", batch.expires_at, now)
    for place, line in enumerate(lines):
        _check_ahead(f"the deadline of line {place}", line.deadline, now)


def check_batch_id(batch_id: str) -> None:
    if not BATCH_ID.fullmatch(batch_id):
        raise BatchInvalid(
            f"batch_id is {shown(batch_id)}; it must be 1 to 128 letters, digits or any of _ . : -"
        )


def digest(batch: NewBatch, lines: Sequence[NewLine], now: float) -> bytes:
    """Equal for equal content. Times enter as milliseconds from now: sending a batch again a moment
    later, with the same windows, gives the same digest."""
    hasher = hashlib.sha256()

    def add(*fields: object) -> None:
        hasher.update(json.dumps(fields, ensure_ascii=True, sort_keys=True).encode())

    add(batch.name, dict(batch.metadata), _ahead_ms(batch.deadline, now), _ahead_ms(batch.expires_at, now))
    for line in lines:
        add(
            line.custom_id,
            hashlib.sha256(line.content or line.request).hexdigest(),
            [line.prompt_tokens, line.max_tokens, line.ttft_slo_s, line.itl_slo_s],
            _ahead_ms(line.deadline, now),
        )
    return hasher.digest()


def shown(text: str) -> str:
    """A short, printable form of what a client sent."""
    return ascii(text if len(text) <= 40 else text[:40] + "...")


def _ahead_ms(time: float | None, now: float) -> int | None:
    return None if time is None else round((time - now) * 1e3)


def _check_line(line: NewLine, name: str, limits: BatchLimits) -> None:
    if not line.custom_id:
        raise BatchInvalid(f"custom_id of {name} is empty; each line must have one of its own")
    _check_text(f"custom_id of {name}", line.custom_id, MAX_CUSTOM_ID_BYTES)
    if len(line.request) > limits.max_line_bytes:
        raise BatchTooLarge(
            f"the request of {name} ({shown(line.custom_id)}) takes {len(line.request)} bytes; "
            f"at most {limits.max_line_bytes} are allowed"
        )
    for field, tokens in (("prompt_tokens", line.prompt_tokens), ("max_tokens", line.max_tokens)):
        if not 1 <= tokens < 2**31:
            raise BatchInvalid(f"{field} of {name} is {tokens}; it must be at least 1")
    for field, seconds in (("ttft_slo_s", line.ttft_slo_s), ("itl_slo_s", line.itl_slo_s)):
        if not (math.isfinite(seconds) and seconds > 0):
            raise BatchInvalid(f"{field} of {name} is {seconds}; it must be a positive finite number")
    _check_finite(f"the deadline of {name}", line.deadline)


def _check_metadata(batch: NewBatch) -> None:
    if len(batch.metadata) > MAX_METADATA_PAIRS:
        raise BatchInvalid(
            f"metadata has {len(batch.metadata)} pairs; at most {MAX_METADATA_PAIRS} are allowed"
        )
    for key, value in batch.metadata.items():
        _check_text("a key of metadata", key, MAX_METADATA_KEY_BYTES)
        _check_text(f"metadata[{shown(key)}]", value, MAX_METADATA_VALUE_BYTES)


def _check_text(name: str, text: str, max_bytes: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise BatchInvalid(f"{name} is {shown(text)}, which is no valid Unicode text") from None
    if size > max_bytes:
        raise BatchInvalid(f"{name} has {size} bytes; at most {max_bytes} are allowed")


def _check_finite(name: str, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise BatchInvalid(f"{name} is {value}; it must be a finite number of seconds")


def _check_ahead(name: str, value: float | None, now: float) -> None:
    if value is not None and value <= now:
        raise BatchInvalid(f"{name} is {now - value:.3f} s in the past; it must lie ahead")
