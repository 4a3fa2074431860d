"""Rotation of queries and keys, and keys and values into the paged pool, for the rows of a step."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from benchmarks.case import Goal, Prepared, Work, relative_error

ERROR_LIMIT = 8e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeKvCase:
    """rows of packed queries, keys and values, in bfloat16."""

    name: str
    rows: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    goal: Goal | None = None
    kernels: tuple[str, ...] = ("rope_kv",)

    def work(self) -> Work:
        """Every head read and written, the angles of a row, and where it goes: two 64-bit numbers."""
        heads = 2 * (self.heads + 2 * self.kv_heads) + 2
        return Work(self.rows * (heads * self.head_dim * torch.bfloat16.itemsize + 16))

    def tiny(self) -> RopeKvCase:
        return replace(self, rows=3)

    def prepare(self, device: torch.device, copies: int) -> Prepared:
        """Calls write to layers of one pool, in which each row has a token of its own."""
        from chiron_kernels.gpu.rope_kv import rope_kv_write
        from chiron_kernels.reference.rope_kv import rope_kv_write as right

        generator = torch.Generator(device).manual_seed(0)
        packed = self.heads + 2 * self.kv_heads

        def noise(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)

        qkv = noise(copies, self.rows, packed * self.head_dim)
        half = noise(self.rows, 1, self.head_dim // 2)
        cos, sin = torch.cat((half.cos(), half.cos()), -1), torch.cat((-half.sin(), half.sin()), -1)
        blocks = -(-self.rows // self.block_size)
        pool = noise(blocks, copies, self.block_size, 2, self.kv_heads, self.head_dim).unbind(1)
        token = torch.randperm(blocks * self.block_size, generator=generator, device=device)[: self.rows]
        places = (token // self.block_size, token % self.block_size, self.heads, self.kv_heads)
        calls = [
            functools.partial(rope_kv_write, rows, cos, sin, kv, *places)
            for rows, kv in zip(qkv, pool, strict=True)
        ]

        def error(call: int, result: torch.Tensor) -> float:
            kv = torch.zeros_like(pool[call])
            q = right(qkv[call], cos, sin, kv, *places)
            written = (token // self.block_size, token % self.block_size)
            return max(relative_error(result, q), relative_error(pool[call][written], kv[written]))

        return Prepared(calls, error, ERROR_LIMIT)
