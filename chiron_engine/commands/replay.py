"""`chiron replay`: have a recorded run decided again, and find the first decision that differs."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from typer import Argument, Option

from .exits import ExitCode, usage_error

if TYPE_CHECKING:
    from .recording_file import Line, RecordingFile

LINES_BEFORE = 3
LONGEST_SHOWN = 400


class Difference(Protocol):
    @property
    def where(self) -> str: ...
    @property
    def expected(self) -> list[str]: ...
    @property
    def got(self) -> list[str]: ...


class Replay(Protocol):
    """Of one section of a recording."""

    title: str

    def feed(self, line: Mapping[str, Any]) -> Difference | None: ...
    def summary(self) -> dict[str, Any]: ...


def replay(
    files: Annotated[
        list[Path],
        Argument(
            metavar="FILE...", help="Written by --event-log or --record-steps.", exists=True, dir_okay=False
        ),
    ],
    as_json: Annotated[bool, Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Replay recorded events of a fleet, or recorded steps of an engine, and compare each decision.

    Exits with 1 at the first decision that differs, with 2 where a file is damaged.
    """
    results = []
    for path in files:
        result = _replay_file(path)
        results.append(result)
        if not as_json:
            print("\n".join(_report(result)), flush=True)
    if as_json:
        print(json.dumps({"files": results}))
    if any(result["difference"] for result in results):
        raise typer.Exit(ExitCode.RUNTIME)


def _replay_file(path: Path) -> dict[str, Any]:
    """Up to the first difference. Raises CommandError where the file cannot be read or is damaged."""
    from .recording_file import RecordingError, RecordingFile

    file = RecordingFile(path)
    try:
        return _replay_lines(file)
    except RecordingError as error:
        raise usage_error(str(error)) from error
    except OSError as error:
        raise usage_error(f"cannot read {path}: {error.strerror}") from error


def _replay_lines(file: RecordingFile) -> dict[str, Any]:
    sections: list[dict[str, Any]] = []
    difference: dict[str, Any] | None = None
    before: deque[Line] = deque(maxlen=LINES_BEFORE)
    current: Replay | None = None
    for line in file:
        try:
            if line.is_header:
                if current is not None:
                    sections.append({"title": current.title, **current.summary()})
                current = _make(line.fields)
                before.clear()
                continue
            assert current is not None  # the first line is a header
            found = current.feed(line.fields)
        except ValueError as error:
            raise usage_error(f"{file.path}, line {line.number}: {error}") from error
        if found is not None:
            difference = _described(found, line, before)
            break
        before.append(line)
    if current is not None:
        sections.append({"title": current.title, **current.summary()})
    return {"file": str(file.path), "sections": sections, "cut_lines": file.cut, "difference": difference}


def _make(header: Mapping[str, Any]) -> Replay:
    """Raises ValueError for a recording of an unknown kind."""
    from chiron_engine.cluster.event_replay import EventReplay
    from chiron_engine.core.step_replay import StepReplay

    kinds: dict[str, type[EventReplay] | type[StepReplay]] = {
        kind.recording: kind for kind in (EventReplay, StepReplay)
    }
    kind = kinds.get(header["recording"]) if isinstance(header["recording"], str) else None
    if kind is None:
        raise ValueError(f"a recording of {header['recording']!r}; this version knows {', '.join(kinds)}")
    return kind(header)


def _described(found: Difference, line: Line, before: deque[Line]) -> dict[str, Any]:
    return {
        "line": line.number,
        "section": line.section,
        "where": found.where,
        "expected": found.expected,
        "got": found.got,
        "before": [f"{earlier.number}: {earlier.text}" for earlier in before],
    }


def _report(result: Mapping[str, Any]) -> list[str]:
    lines = [] if result["sections"] else [f"{result['file']} is empty: nothing was decided"]
    for number, section in enumerate(result["sections"], 1):
        lines.append(f"{result['file']}, section {number}: {section['title']}")
        lines += [f"  {_counted(name, value)}" for name, value in section.items() if name != "title"]
    lines += [
        f"  line {number} was cut short, as by a kill, and is left out" for number in result["cut_lines"]
    ]
    difference = result["difference"]
    if difference is None:
        return [*lines, "no decision differs"]
    lines.append(f"line {difference['line']} differs: {_shortened(difference['where'])}")
    lines += [f"  expected {_shortened(told)}" for told in difference["expected"] or ["nothing"]]
    lines += [f"  got      {_shortened(told)}" for told in difference["got"] or ["nothing"]]
    return [*lines, "the lines before:", *(f"  {_shortened(text)}" for text in difference["before"])]


def _counted(name: str, value: Any) -> str:
    label = name.removesuffix("_s").replace("_", " ")
    if isinstance(value, dict):
        return f"{label}: {', '.join(f'{key} {count}' for key, count in value.items()) or 'none'}"
    return f"{label}: {value:.3f} s" if isinstance(value, float) else f"{label}: {value}"


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text)} characters)"
