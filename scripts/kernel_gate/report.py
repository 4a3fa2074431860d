"""What was compiled, as a Markdown table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from scripts.kernel_gate.compiled import Compiled, NotCompiled
from scripts.kernel_gate.judge import Fault

COLUMNS = (
    "case",
    "sm",
    "triton",
    "regs",
    "stack",
    "spills",
    "shared",
    "SASS",
    "HGMMA",
    "UTCMMA",
    "HMMA",
    "UTMALDG",
    "16 B",
    "narrow",
    "blocks/SM",
)


def markdown(results: Sequence[Compiled | NotCompiled]) -> str:
    """One row for each; regs: a thread's, shared: bytes of a block, 16 B and narrow: loads by their width."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(map(str, _cells(result)))} |" for result in results]
    return "\n".join(lines)


def _cells(result: Compiled | NotCompiled) -> tuple[Any, ...]:
    if isinstance(result, NotCompiled):
        return (*result.key, "does not compile", *[""] * (len(COLUMNS) - 4))
    code = result.code
    return (
        *result.key,
        code.registers,
        code.stack + code.local,
        code.spills,
        result.shared,
        code.instructions,
        code.hgmma,
        code.utcmma,
        code.hmma,
        code.tensor_loads,
        code.wide_loads,
        code.narrow_loads,
        result.blocks,
    )


def as_json(results: Sequence[Compiled | NotCompiled], faults: Sequence[Fault]) -> str:
    kernels = [
        {**result.key._asdict(), **_figures(result)} for result in results if isinstance(result, Compiled)
    ]
    return json.dumps({"kernels": kernels, "faults": [str(fault) for fault in faults]}, indent=1) + "\n"


def _figures(result: Compiled) -> dict[str, int]:
    code = asdict(result.code)
    del code["shared"]
    return {"threads": result.threads, "shared": result.shared, "blocks": result.blocks, **code}
