"""Scattered blocks of the KV pool into others, on the device or in pinned memory of the host."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from benchmarks.case import Goal, Prepared, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopyCase:
    """blocks of `block_bytes`. to_host: into pinned memory, over the bus."""

    name: str
    blocks: int
    block_bytes: int
    to_host: bool = False
    goal: Goal | None = None
    kernels: tuple[str, ...] = ("block_copy",)

    def work(self) -> Work:
        """Read and written; to the host, each byte crosses the bus once."""
        moved = self.blocks * self.block_bytes
        return Work(moved, bus_bytes=moved) if self.to_host else Work(2 * moved)

    def tiny(self) -> BlockCopyCase:
        return replace(self, blocks=2, block_bytes=min(self.block_bytes, 8192))

    def prepare(self, device: torch.device, copies: int) -> Prepared:
        """Every second block of the source, in random order, into a dense target, in another."""
        from chiron_kernels.gpu.block_copy import copy_blocks

        generator = torch.Generator(device).manual_seed(0)
        shape = (copies, 2 * self.blocks, self.block_bytes)
        source = torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)
        pinned = self.to_host and device.type == "cuda"
        target = torch.zeros(
            (copies, self.blocks, self.block_bytes),
            dtype=torch.uint8,
            device="cpu" if self.to_host else device,
            pin_memory=pinned,
        )
        sources = 2 * torch.randperm(self.blocks, generator=generator, device=device)
        targets = torch.randperm(self.blocks, generator=generator, device=device)
        calls = [
            functools.partial(copy_blocks, source[copy], sources, target[copy], targets)
            for copy in range(copies)
        ]

        def error(call: int, result: None) -> float:
            """0 or without end: a copy is right or it is not."""
            copied = target[call][targets.to(target.device)]
            same = torch.equal(copied, source[call][sources].to(target.device))
            return 0.0 if same else float("inf")

        return Prepared(calls, error, 0.0)
