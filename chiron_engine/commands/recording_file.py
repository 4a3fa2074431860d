"""Reads recordings, JSON lines in sections, each begun by a header; holds one line at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

LONGEST_LINE = 256 << 20


class RecordingError(ValueError):
    """The file is no recording, or damaged."""


@dataclass(frozen=True, slots=True)
class Line:
    """section: counted from 1. is_header: the first line of its section."""

    number: int
    section: int
    fields: dict[str, Any]
    is_header: bool
    text: str


class RecordingFile:
    """Iterate once over its lines. What a kill leaves is no error: an empty file, or a last line of a
    section that is cut short, which is passed over and stands in `cut`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut: list[int] = []

    def __iter__(self) -> Iterator[Line]:
        """Raises RecordingError at a line that is damaged, with its number, and OSError."""
        section, bad = 0, 0
        with self.path.open("rb") as file:
            for number, raw in enumerate(_raw_lines(file), 1):
                fields = _fields(raw)
                is_header = fields is not None and "recording" in fields
                if bad:
                    if not is_header:
                        self._fail(bad, "it is no JSON object")
                    self.cut.append(bad)
                    bad = 0
                if fields is None:
                    bad = number
                    is_last = not raw.endswith(b"\n")
                    continue
                if not section and not is_header:
                    self._fail(number, "a recording starts with a header that names it")
                section += is_header
                yield Line(number, section, fields, is_header, raw.decode().rstrip("\n"))
        if bad and not (is_last and section):
            self._fail(bad, "it is no JSON object")
        if bad:
            self.cut.append(bad)

    def _fail(self, number: int, message: str) -> NoReturn:
        raise RecordingError(f"{self.path}, line {number}: {message}")


def _raw_lines(file: BinaryIO) -> Iterator[bytes]:
    while raw := file.readline(LONGEST_LINE):
        yield raw


def _fields(raw: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(raw)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None
