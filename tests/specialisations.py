"""Which machine code Triton would make for launches, where there is no GPU to make it for.

Triton compiles a kernel anew for each combination of its constants, options, and what it takes as known of
the other arguments: types, integers that are 1 or divisible by 16, addresses divisible by 16. Here these
combinations are found as its compiling runtime finds them, by its own code, and launches are not run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from chiron_kernels.gpu.launch import Launch

HOPPER = 90
TOKENS, VALID = "tokens", "valid"


@dataclass(slots=True)
class LaunchRecord:
    """met: the specialisations launched so far, by kernel."""

    met: dict[str, set[str]] = field(default_factory=dict)

    def note(self, launch: Launch) -> None:
        if 0 in launch.grid:
            return
        self.met.setdefault(launch.kernel.__name__, set()).add(specialisation(launch))
        _give_token_zero(launch)

    @property
    def count(self) -> int:
        return sum(map(len, self.met.values()))

    def beyond(self, before: dict[str, set[str]]) -> dict[str, set[str]]:
        """What was met and is not in `before`, which was."""
        more = {name: keys - before.get(name, set()) for name, keys in self.met.items()}
        return {name: keys for name, keys in more.items() if keys}

    def copy(self) -> dict[str, set[str]]:
        return {name: set(keys) for name, keys in self.met.items()}


def record_launches(monkeypatch: pytest.MonkeyPatch) -> LaunchRecord:
    """In place of running them. What kernels would write stays as it was allocated, but for the tokens
    that are sampled, which index other tensors: they are 0."""
    record = LaunchRecord()
    monkeypatch.setattr(Launch, "run", lambda launch: record.note(launch))
    return record


def _give_token_zero(launch: Launch) -> None:
    if VALID in launch.arguments:
        launch.arguments[TOKENS].zero_()
        launch.arguments[VALID].fill_(True)


def specialisation(launch: Launch) -> str:
    """Equal for two launches of a kernel exactly if they run the same machine code."""
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "maxnreg": launch.max_registers,
    }
    _, found, rest = _binder(launch.kernel)(**launch.arguments, **options)
    return str([*zip(launch.kernel.arg_names, found, strict=True), sorted(rest.items())])


@functools.cache
def _binder(kernel: Any) -> Callable[..., tuple[Any, list[Any], dict[str, Any]]]:
    """As `JITFunction.create_binder`, which needs a GPU. kernel: as the interpreter has it."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import KernelParam, create_function_from_signature

    signature = inspect.signature(kernel.fn)
    apart = kernel.kwargs.get("do_not_specialize") or ()
    unaligned = kernel.kwargs.get("do_not_specialize_on_alignment") or ()
    assert set(apart) | set(unaligned) <= set(signature.parameters)
    parameters = [
        KernelParam(number, parameter, name in apart, name in unaligned)
        for number, (name, parameter) in enumerate(signature.parameters.items())
    ]
    backend = CUDABackend(GPUTarget("cuda", HOPPER, 32))
    return create_function_from_signature(signature, parameters, backend)
