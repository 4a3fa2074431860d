"""Comma-separated text, plain or gzipped, as named columns."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from .checks import Places, TraceError
from .columns import Floats


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Reads UTF-8, with or without a byte order mark. Raises TraceError when the file is missing, no
    file, no text, or broken gzip; also for what is only found while reading."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            content = gzip.GzipFile(fileobj=raw) if zipped else raw
            yield io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{path}: the gzip data is damaged or cut short ({error})") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: no UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True)
class TextTable:
    """Cells of the columns asked for, by name, with the line each row stood on."""

    source: str
    columns: dict[str, list[str]]
    lines: NDArray[np.int64]

    @property
    def places(self) -> Places:
        return Places(self.source, self.lines)

    def numbers(self, column: str) -> Floats:
        """Raises TraceError that counts the cells which are no numbers."""
        cells = self.columns[column]
        try:
            return np.array([float(cell) for cell in cells], dtype=np.float64)
        except ValueError:
            wrong = np.array([not _is_number(cell) for cell in cells])
        problem = self.places.tell(wrong, f"no number in {column}", "give a number", cells)
        raise TraceError(f"{self.source}: {problem}")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_header(path: Path) -> list[str]:
    """Names of the columns. Raises TraceError for an empty file, or one that does not start as CSV."""
    with open_text(path) as text:
        try:
            header = next(csv.reader(text), None)
        except csv.Error as error:
            raise TraceError(f"{path}: the header is no valid CSV ({error})") from error
    if header is None:
        raise TraceError(f"{path}: the file is empty; the first line names the columns")
    return [name.strip() for name in header]


def read_table(path: Path, wanted: tuple[str, ...]) -> TextTable:
    """Raises TraceError that names the columns missing or there twice, or counts the rows with too few
    cells."""
    header = read_header(path)
    twice = [name for name in wanted if header.count(name) > 1]
    if twice:
        raise TraceError(f"{path}: column {', '.join(twice)} is there more than once; give it once")
    missing = [name for name in wanted if name not in header]
    if missing:
        raise TraceError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(header) or 'none'}"
            f" and must have {', '.join(wanted)}"
        )
    places = [header.index(name) for name in wanted]
    rows, lines = _read_rows(path)
    _check_cells(str(path), rows, lines, max(places) + 1)
    columns = {name: [row[place] for row in rows] for name, place in zip(wanted, places, strict=True)}
    return TextTable(str(path), columns, lines)


def _read_rows(path: Path) -> tuple[list[list[str]], NDArray[np.int64]]:
    rows, lines = [], []
    with open_text(path) as text:
        reader = csv.reader(text)
        try:
            next(reader)
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
        except csv.Error as error:
            raise TraceError(f"{path}: line {reader.line_num} is no valid CSV ({error})") from error
    return rows, np.array(lines, dtype=np.int64)


def _check_cells(source: str, rows: list[list[str]], lines: NDArray[np.int64], needed: int) -> None:
    short = np.array([len(row) < needed for row in rows], dtype=bool)
    if short.any():
        what = Places(source, lines).tell(short, "too few cells", f"at least {needed} are needed")
        raise TraceError(f"{source}: {what}")
