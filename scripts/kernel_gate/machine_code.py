"""What a cubin's machine code shows, read with the disassembler that comes with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SYSTEM_SHARED = 1024
"""Bytes of shared memory that the system takes in each block: on architectures from 90 the assembler counts
them as the kernel's own, though the limit of a block does not include them."""

_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_RESOURCE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")
_WIDE = (".128", ".256")
_LOADS = ("LDG", "LDGSTS")
_SPILLS = ("LDL", "STL")
_BLACKWELL_MATRIX = re.compile(r"UTC[A-Z]*MMA$")


@dataclass(frozen=True, slots=True)
class MachineCode:
    """registers: of a thread. stack, local: bytes of a thread. shared: bytes of a block that are reserved
    when it is compiled, the system's own left out. The others count instructions; NOPs, which fill the end
    up, are not counted. wide_loads, narrow_loads: from global memory, of at least and of under 16 bytes a
    thread."""

    registers: int
    stack: int
    local: int
    shared: int
    instructions: int
    spills: int
    hgmma: int
    utcmma: int
    hmma: int
    tensor_loads: int
    wide_loads: int
    narrow_loads: int
    barriers: int


def read_machine_code(cubin: bytes, architecture: int, tools: Path) -> MachineCode:
    """tools: the folder of cuobjdump and nvdisasm. Raises subprocess.CalledProcessError where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        resources = parse_resources(_output([tools / "cuobjdump", "--dump-resource-usage", path]))
        opcodes = parse_opcodes(_output([tools / "nvdisasm", "-c", "-ndf", path]))
    if architecture >= 90:
        resources["SHARED"] = max(resources["SHARED"] - SYSTEM_SHARED, 0)
    return _counted(resources, opcodes)


def _output(command: list[str | Path]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse_resources(text: str) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL from cuobjdump's words; the largest, where a kernel has several functions.
    Raises ValueError where one is missing."""
    found: dict[str, int] = {}
    for name, value in _RESOURCE.findall(text):
        found[name] = max(found.get(name, 0), int(value))
    missing = {"REG", "STACK", "SHARED", "LOCAL"} - found.keys()
    if missing:
        raise ValueError(f"cuobjdump names no {', '.join(sorted(missing))}: {text.strip()[:200]!r}")
    return found


def parse_opcodes(text: str) -> dict[str, int]:
    """How often each instruction with its modifiers, `LDG.E.128`, stands in nvdisasm's listing. Raises
    ValueError where there is none."""
    counts: dict[str, int] = {}
    for opcode in _OPCODE.findall(text):
        if opcode != "NOP":
            counts[opcode] = counts.get(opcode, 0) + 1
    if not counts:
        raise ValueError("nvdisasm listed no instructions")
    return counts


def _counted(resources: Mapping[str, int], opcodes: Mapping[str, int]) -> MachineCode:
    by_kind: dict[str, int] = {}
    wide = narrow = utcmma = 0
    for opcode, count in opcodes.items():
        kind = opcode.partition(".")[0]
        by_kind[kind] = by_kind.get(kind, 0) + count
        if kind in _LOADS and any(width in opcode for width in _WIDE):
            wide += count
        elif kind in _LOADS:
            narrow += count
        elif _BLACKWELL_MATRIX.match(kind):
            utcmma += count
    return MachineCode(
        registers=resources["REG"],
        stack=resources["STACK"],
        local=resources["LOCAL"],
        shared=resources["SHARED"],
        instructions=sum(opcodes.values()),
        spills=sum(by_kind.get(kind, 0) for kind in _SPILLS),
        hgmma=by_kind.get("HGMMA", 0),
        utcmma=utcmma,
        hmma=by_kind.get("HMMA", 0),
        tensor_loads=by_kind.get("UTMALDG", 0),
        wide_loads=wide,
        narrow_loads=narrow,
        barriers=by_kind.get("BAR", 0),
    )
