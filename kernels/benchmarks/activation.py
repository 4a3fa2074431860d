"""The gated activation of the rows of a step."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from benchmarks.case import Goal, Prepared, Work, relative_error

ERROR_LIMIT = 8e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationCase:
    """rows of gate and up, `width` each, in bfloat16."""

    name: str
    rows: int
    width: int
    goal: Goal | None = None
    kernels: tuple[str, ...] = ("activation",)

    def work(self) -> Work:
        """Gate and up read, their product written."""
        return Work(3 * self.rows * self.width * torch.bfloat16.itemsize)

    def tiny(self) -> ActivationCase:
        return replace(self, rows=2)

    def prepare(self, device: torch.device, copies: int) -> Prepared:
        from chiron_kernels.gpu.activation import gated_activation

        generator = torch.Generator(device).manual_seed(0)
        shape = (copies, self.rows, 2 * self.width)
        data = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)
        calls = [functools.partial(gated_activation, gate_up, "silu") for gate_up in data]

        def error(call: int, result: torch.Tensor) -> float:
            gate, up = data[call].float().chunk(2, dim=-1)
            return relative_error(result, torch.nn.functional.silu(gate) * up)

        return Prepared(calls, error, ERROR_LIMIT)
