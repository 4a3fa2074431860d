"""What every case of a benchmark offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

if TYPE_CHECKING:
    from benchmarks.attention_inputs import AttentionInputs


@dataclass(frozen=True, slots=True)
class Work:
    """The least that a call must do. bytes: of the device's memory, read and written, each once. flops: of
    matrix products. bus_bytes: to the host."""

    bytes: int
    flops: int = 0
    bus_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Goal:
    """unit: one of `CaseResult.measures`; smaller is better for us, larger for all others. than: for the unit
    `x`, the name of the case whose time in the same run is to be so many times ours."""

    value: float
    unit: str
    than: str = ""

    def __str__(self) -> str:
        if self.than:
            return f"{self.value:g} times as quick as {self.than}"
        return f"{self.value:g} {self.unit}"


@dataclass(frozen=True, slots=True)
class Prepared:
    """calls: the same work, each on data of its own, so that none finds its data in the cache.
    error: how far a call's result is from what is right, relative to it; limit: how far it may be. peers:
    what other implementations need to do the same; None where there are none to compare with. alternatives:
    by name, calls that do the same on the same data by other kernels of ours."""

    calls: Sequence[Callable[[], Any]]
    error: Callable[[int, Any], float]
    limit: float
    peers: AttentionInputs | None = None
    alternatives: Mapping[str, Sequence[Callable[[], Any]]] = field(default_factory=dict)


class Case(Protocol):
    """name: unique. kernels: modules of chiron_kernels.gpu that a call needs. goal: None if none is set."""

    @property
    def name(self) -> str: ...

    @property
    def goal(self) -> Goal | None: ...

    @property
    def kernels(self) -> tuple[str, ...]: ...

    def work(self) -> Work: ...

    def tiny(self) -> Self:
        """The same kind of work in a shape that Triton's interpreter goes through in a second or so."""
        ...

    def prepare(self, device: torch.device, copies: int) -> Prepared:
        """copies: how many calls."""
        ...


def relative_error(result: torch.Tensor, right: torch.Tensor) -> float:
    """Of the Euclidean norms. NaN in the result is an error without end."""
    error = (result.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30)
    return float(error.nan_to_num(nan=float("inf")))
