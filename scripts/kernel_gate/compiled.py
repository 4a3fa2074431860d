"""What came of compiling a case for an architecture with a version of Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from scripts.kernel_gate.device_limits import blocks_per_multiprocessor
from scripts.kernel_gate.machine_code import MachineCode


class Key(NamedTuple):
    """architecture: compute capability times 10. triton: version."""

    case: str
    architecture: int
    triton: str

    def __str__(self) -> str:
        return f"{self.case} | sm_{self.architecture} | triton {self.triton}"


@dataclass(frozen=True, slots=True)
class Compiled:
    """threads: of a block. dynamic_shared: bytes of shared memory that a launch asks for."""

    key: Key
    threads: int
    dynamic_shared: int
    code: MachineCode

    @property
    def shared(self) -> int:
        """Bytes of a block."""
        return self.dynamic_shared + self.code.shared

    @property
    def blocks(self) -> int:
        """Predicted to run side by side on a multiprocessor."""
        return blocks_per_multiprocessor(
            self.key.architecture, self.code.registers, self.threads, self.shared
        )


@dataclass(frozen=True, slots=True)
class NotCompiled:
    """reason: the compiler's, in a line."""

    key: Key
    reason: str
