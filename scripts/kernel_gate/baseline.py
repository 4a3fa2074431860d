"""Sizes of compiled kernels as they were accepted: a JSON file, an entry a line, sorted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.kernel_gate.compiled import Compiled, Key

PATH = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "compile_baseline.json"

_KEY = re.compile(r"(?P<case>.+) \| sm_(?P<architecture>\d+) \| triton (?P<triton>\S+)")


@dataclass(frozen=True, slots=True)
class Size:
    """instructions: in the machine code. registers: of a thread."""

    instructions: int
    registers: int


def size_of(compiled: Compiled) -> Size:
    return Size(compiled.code.instructions, compiled.code.registers)


def read_baseline(path: Path) -> dict[Key, Size]:
    """Nothing where there is no file. Raises ValueError for an entry that is none."""
    if not path.exists():
        return {}
    return {_key(name): Size(**size) for name, size in json.loads(path.read_text(encoding="utf-8")).items()}


def _key(name: str) -> Key:
    match = _KEY.fullmatch(name)
    if match is None:
        raise ValueError(f"baseline has an entry {name!r}; it must be `case | sm_90 | triton 3.6.0`")
    return Key(match["case"], int(match["architecture"]), match["triton"])


def write_baseline(path: Path, sizes: Mapping[Key, Size]) -> None:
    lines = [f"{json.dumps(str(key))}: {json.dumps(asdict(sizes[key]))}" for key in sorted(sizes)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
