"""What is wrong with a compiled kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from scripts.kernel_gate.baseline import Size
from scripts.kernel_gate.case import Case
from scripts.kernel_gate.compiled import Compiled, Key
from scripts.kernel_gate.device_limits import REGISTERS, SHARED_OF_BLOCK, registers_of_block

GROWTH = 1.10
"""A kernel may have so many times the instructions and registers of its baseline."""

HOPPER, BLACKWELL = 90, 100


@dataclass(frozen=True, slots=True)
class Fault:
    key: Key
    what: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}"


def find_faults(compiled: Compiled, case: Case, before: Size | None) -> list[Fault]:
    """before: the baseline; None where there is none, which is a fault."""
    reasons = [*_does_not_fit(compiled), *_breaks_promises(compiled, case), *_grew(compiled, before)]
    return [Fault(compiled.key, reason) for reason in reasons]


def _does_not_fit(compiled: Compiled) -> Iterator[str]:
    """What holds for every kernel."""
    code = compiled.code
    if code.spills:
        yield f"registers spill: {code.spills} loads and stores of local memory (LDL, STL), limit 0"
    for name, value in (("stack", code.stack), ("local memory", code.local)):
        if value:
            yield f"{name} of {value} bytes a thread, limit 0"
    limit = SHARED_OF_BLOCK[compiled.key.architecture]
    if compiled.shared > limit:
        yield f"shared memory of {compiled.shared} bytes a block, limit {limit}"
    taken = registers_of_block(code.registers, compiled.threads)
    if taken > REGISTERS:
        yield f"{taken} registers a block ({code.registers} x {compiled.threads} threads), limit {REGISTERS}"


def _breaks_promises(compiled: Compiled, case: Case) -> Iterator[str]:
    """What this case asks for."""
    code, architecture = compiled.code, compiled.key.architecture
    if case.narrow_loads is not None and code.narrow_loads > case.narrow_loads:
        yield f"{code.narrow_loads} loads of under 16 bytes a thread, limit {case.narrow_loads}"
    if case.matrix_units and architecture >= BLACKWELL and not code.utcmma:
        yield "no matrix instructions of the tensor cores (UTC*MMA): 0, at least 1"
    if case.matrix_units and HOPPER <= architecture < BLACKWELL and not code.hgmma:
        yield "no matrix instructions of a warp group (HGMMA): 0, at least 1"
    if case.tensor_loads and architecture >= HOPPER and not code.tensor_loads:
        yield "no bulk tensor copies (UTMALDG): 0, at least 1"
    if case.barrier and not code.barriers:
        yield "no barrier (BAR): 0, at least 1"


def _grew(compiled: Compiled, before: Size | None) -> Iterator[str]:
    if before is None:
        yield "no baseline: take it in with --update"
        return
    code = compiled.code
    for name, now, then in (
        ("instructions", code.instructions, before.instructions),
        ("registers", code.registers, before.registers),
    ):
        if now > GROWTH * then:
            yield f"{now} {name}, {now / then - 1:.0%} over the baseline of {then}, limit {GROWTH - 1:.0%}"


def find_stale(baseline: Mapping[Key, Size], wanted: Iterable[Key]) -> list[Fault]:
    """Entries of the baseline that no case has any longer."""
    known = set(wanted)
    return [
        Fault(key, "in the baseline without a case: drop it with --update")
        for key in sorted(baseline)
        if key not in known
    ]
