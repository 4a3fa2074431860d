"""Residual addition and norm of the rows of a step."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from benchmarks.case import Goal, Prepared, Work, relative_error

EPS = 1e-5
ERROR_LIMIT = 8e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class NormCase:
    """rows of `width`, in bfloat16."""

    name: str
    rows: int
    width: int
    goal: Goal | None = None
    kernels: tuple[str, ...] = ("norm",)

    def work(self) -> Work:
        """Row and residual read, sum and norm written, and the weight."""
        return Work((4 * self.rows + 1) * self.width * torch.bfloat16.itemsize)

    def tiny(self) -> NormCase:
        return replace(self, rows=2)

    def prepare(self, device: torch.device, copies: int) -> Prepared:
        from chiron_kernels.gpu.norm import add_rms_norm
        from chiron_kernels.reference.norm import add_rms_norm as right

        generator = torch.Generator(device).manual_seed(0)
        shape = (copies, 2, self.rows, self.width)
        data = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)
        weight = torch.empty(self.width, dtype=torch.bfloat16, device=device).normal_(generator=generator)
        calls = [functools.partial(add_rms_norm, x, delta, weight, EPS) for x, delta in data]

        def error(call: int, result: tuple[torch.Tensor, torch.Tensor]) -> float:
            x, delta = data[call]
            return max(map(relative_error, result, right(x, delta, weight, EPS)))

        return Prepared(calls, error, ERROR_LIMIT)
