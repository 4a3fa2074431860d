"""The next tokens of the rows of a step, greedy or drawn."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from benchmarks.case import Goal, Prepared, Work

TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.8, 50, 0.9, 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCase:
    """rows of float32 logits over `vocab` tokens. drawn: with top-k and top-p; else the largest."""

    name: str
    rows: int
    vocab: int
    drawn: bool = False
    goal: Goal | None = None
    kernels: tuple[str, ...] = ("sampling",)

    def work(self) -> Work:
        """The logits, read once."""
        return Work(self.rows * self.vocab * torch.float32.itemsize)

    def tiny(self) -> SampleCase:
        return replace(self, rows=2, vocab=700)

    def prepare(self, device: torch.device, copies: int) -> Prepared:
        from chiron_kernels.gpu.sampling import sample_rows

        generator = torch.Generator(device).manual_seed(0)
        logits = torch.empty(copies, self.rows, self.vocab, device=device).normal_(0, 2, generator=generator)

        def each(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((self.rows,), value, dtype=dtype, device=device)

        seeds = torch.arange(self.rows, dtype=torch.int64, device=device)
        parameters = (
            each(TEMPERATURE if self.drawn else 0.0, torch.float32),
            each(MIN_P, torch.float32),
            each(TOP_K if self.drawn else 0, torch.int64),
            each(TOP_P if self.drawn else 1.0, torch.float64),
            seeds,
            seeds + 1,
        )
        calls = [functools.partial(sample_rows, rows, *parameters, filtered=self.drawn) for rows in logits]

        def error(call: int, result: tuple[torch.Tensor, torch.Tensor]) -> float:
            """0 or without end: a token may be chosen or it may not."""
            chosen = logits[call].gather(1, result[0][:, None])
            least = logits[call].topk(TOP_K if self.drawn else 1, dim=1).values[:, -1:]
            return 0.0 if bool((chosen >= least).all()) else float("inf")

        return Prepared(calls, error, 0.0)
