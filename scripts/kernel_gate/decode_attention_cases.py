"""What the engine launches to decode: the head geometries of common models, blocks of 16 and 64 tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from chiron_kernels.gpu.decode_attention import decode_attention_launch
from chiron_kernels.gpu.decode_plan import LONGEST_TILE, DecodeSplits, empty_splits
from chiron_kernels.gpu.decode_splits import decode_splits_launch
from chiron_kernels.gpu.launch import HOPPER, Launch
from chiron_kernels.gpu.merge_splits import merge_splits_launch

from scripts.kernel_gate.case import ARCHITECTURES, Case

BATCH = 32
BLOCKS = 1024
TABLE_KEYS = 8192
LAYERS = 32

TABLE_LOADS = 64
"""Loads of under 16 bytes: of the work list, the block table and lengths. Were the loads of keys and values
not of 16 bytes, there would be more than twice as many."""


@dataclass(frozen=True, slots=True)
class Geometry:
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype = torch.bfloat16
    eight_bits: bool = False
    query_len: int = 1
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    lse: bool = False

    def name(self) -> str:
        options = [
            "fp8 kv" if self.eight_bits else "",
            f"q{self.query_len}" if self.query_len > 1 else "",
            f"window {self.window}" if self.window else "",
            "softcap" if self.softcap else "",
            "sinks" if self.sinks else "",
            "lse" if self.lse else "",
        ]
        short = "bf16" if self.dtype == torch.bfloat16 else "fp16"
        shape = f"{self.heads}/{self.kv_heads} d{self.head_dim} block {self.block_size} {short}"
        return " ".join([shape, *filter(None, options)])

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device="meta")

    def kv(self) -> torch.Tensor:
        shape = (BLOCKS, LAYERS, self.block_size, 2, self.kv_heads, self.head_dim)
        return self.empty(*shape, dtype=torch.float8_e4m3fn if self.eight_bits else self.dtype)[:, 0]

    def tables(self) -> torch.Tensor:
        return self.empty(BATCH, TABLE_KEYS // self.block_size, dtype=torch.int64)

    def lens(self) -> torch.Tensor:
        return self.empty(BATCH, dtype=torch.int64)

    def splits(self) -> DecodeSplits:
        return empty_splits(self.lens(), self.kv(), self.tables(), self.query_len, self.window, None)

    def parts(self, splits: DecodeSplits) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.heads // self.kv_heads * self.query_len
        partial = self.empty(splits.capacity, self.kv_heads, rows, self.head_dim, dtype=torch.float32)
        return partial, self.empty(*partial.shape[:3], dtype=torch.float32)

    def results(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = self.empty(BATCH * self.query_len, self.heads, self.head_dim)
        return out, self.empty(*out.shape[:2], dtype=torch.float32) if self.lse else None


GEOMETRIES = tuple(
    Geometry(heads, kv_heads, head_dim, block_size, **options)  # type: ignore[arg-type]
    for block_size in (16, 64)
    for heads, kv_heads, head_dim, options in (
        (32, 8, 128, {}),
        (32, 8, 128, {"dtype": torch.float16}),
        (32, 8, 128, {"eight_bits": True}),
        (9, 3, 64, {"eight_bits": True}),
        (16, 8, 256, {"eight_bits": True}),
        (32, 8, 128, {"query_len": 2}),
        (32, 8, 128, {"query_len": 4, "lse": True}),
        (32, 8, 128, {"query_len": 8, "window": 4096}),
        (16, 8, 128, {}),
        (32, 32, 128, {}),
        (8, 1, 128, {}),
        (28, 4, 128, {}),
        (40, 8, 128, {}),
        (16, 1, 128, {"query_len": 8}),
        (9, 3, 64, {}),
        (64, 8, 64, {"window": 128, "sinks": True}),
        (32, 32, 80, {}),
        (32, 32, 96, {}),
        (16, 8, 256, {"window": 4096, "softcap": 50.0}),
        (8, 1, 256, {"query_len": 8}),
    )
)


def _attention(geometry: Geometry) -> Launch:
    splits, (out, lse) = geometry.splits(), geometry.results()
    q_width = (geometry.heads + 2 * geometry.kv_heads) * geometry.head_dim
    packed = geometry.empty(BATCH * geometry.query_len, q_width)
    q = packed[:, : geometry.heads * geometry.head_dim].unflatten(1, (geometry.heads, geometry.head_dim))
    sinks = geometry.empty(geometry.heads) if geometry.sinks else None
    lens, scale = geometry.lens(), geometry.head_dim**-0.5
    return decode_attention_launch(
        q, geometry.kv(), geometry.tables(), lens, lens, splits, scale, geometry.window, geometry.softcap,
        sinks, geometry.query_len, lse, 1.0, 1.0, out, *geometry.parts(splits),
    )  # fmt: skip


def _merge(geometry: Geometry) -> Launch:
    splits = geometry.splits()
    return merge_splits_launch(*geometry.parts(splits), splits, *geometry.results())


def _splits(geometry: Geometry) -> Launch:
    return decode_splits_launch(geometry.lens(), geometry.splits())


def _attention_cases(geometry: Geometry) -> list[Case]:
    name = f"decode_attention {geometry.name()}"
    architectures = tuple(a for a in ARCHITECTURES if a >= HOPPER or not geometry.eight_bits)
    # Values of 8 bits are read 4 or 8 bytes at a time by address: Triton lays them out for the product.
    narrow_loads = None if geometry.eight_bits else TABLE_LOADS
    return [
        Case(
            name,
            lambda: _attention(geometry),
            (architecture,),
            narrow_loads=narrow_loads,
            tensor_loads=architecture >= HOPPER and geometry.block_size >= LONGEST_TILE,
        )
        for architecture in architectures
    ]


def cases() -> list[Case]:
    found = []
    for geometry in GEOMETRIES:
        found += _attention_cases(geometry)
        found.append(Case(f"merge_splits {geometry.name()}", lambda g=geometry: _merge(g)))
        found.append(Case(f"decode_splits {geometry.name()}", lambda g=geometry: _splits(g)))
    return found
