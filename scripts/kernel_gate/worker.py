"""A process that compiles cases with the Triton it finds. Started by `scripts.kernel_gate.workers`.

Each line of the standard input is a JSON task: module, case, architecture. Each is answered by a JSON line on
the standard output: a compiled kernel's figures, or the reason why there are none.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from scripts.kernel_gate import machine_code
from scripts.kernel_gate.case import Case, load_cases
from scripts.kernel_gate.target import WARP_SIZE, compile_for

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

READER = hashlib.sha256(Path(machine_code.__file__).read_bytes()).hexdigest()[:16]
FIGURES = Path(os.environ["TRITON_CACHE_DIR"]) / f"machine-code-{READER}"

_load = functools.cache(load_cases)


def compile_case(case: Case, architecture: int) -> dict[str, Any]:
    compile_for(architecture)
    kernel = case.launch().compile()
    return {
        "threads": kernel.metadata.num_warps * WARP_SIZE,
        "dynamic_shared": kernel.metadata.shared,
        "code": figures_of(kernel.asm["cubin"], architecture),
    }


def figures_of(cubin: bytes, architecture: int) -> dict[str, int]:
    """Disassembling takes longer than fetching a kernel from Triton's cache: each cubin is read once, and
    again when the reader changes."""
    known = FIGURES / f"{hashlib.sha256(cubin).hexdigest()}.json"
    if known.exists():
        return json.loads(known.read_text())
    figures = asdict(machine_code.read_machine_code(cubin, architecture, TOOLS))
    FIGURES.mkdir(parents=True, exist_ok=True)
    own = known.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps(figures))
    own.replace(known)  # at once: others may read it
    return figures


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Whatever a compiler throws is what there is to report."""
    try:
        return compile_case(_load(task["module"])[task["case"], task["architecture"]], task["architecture"])
    except Exception as error:
        message = " ".join(str(error).split())
        return {"reason": f"{type(error).__name__}: {message[:500]}"}


def main() -> None:
    # Compilers print what they like: only answers may stand on the standard output.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
