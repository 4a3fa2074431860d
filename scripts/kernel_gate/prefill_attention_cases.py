"""What the engine launches for chunks of prompts: `query_blocks`, `prefill_attention`, `merge_parts`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from chiron_kernels.gpu.launch import HOPPER, Launch
from chiron_kernels.gpu.merge_parts import merge_parts_launch
from chiron_kernels.gpu.paged_kv import EIGHT_BITS
from chiron_kernels.gpu.prefill_attention import prefill_attention_launch
from chiron_kernels.gpu.query_blocks import QueryBlocks, block_capacity, block_rows, query_blocks_launch

from scripts.kernel_gate.case import ARCHITECTURES, Case

LAYERS = 4
"""Blocks lie as far apart as so many layers make them."""

SLOTS, TABLE_WIDTH, POOL_BLOCKS = 64, 2048, 1000
CHUNK = 2048
WARP_GROUP_ROWS = 64
"""From here on a block is computed by the matrix instructions of a warp group."""

NARROW_LOADS = 128
"""Of the tables: where blocks are smaller than tiles, one for each key of a thread at each place that loads a
tile. Keys and values, loaded 2 bytes at a time, would be many hundreds."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """heads: of queries and of keys. chunk: tokens of each of the chunks."""

    heads: tuple[int, int]
    head_dim: int
    block_size: int
    chunks: int = 1
    chunk: int = CHUNK
    dtype: torch.dtype = torch.bfloat16
    eight_bits: bool = False

    @property
    def group(self) -> int:
        return self.heads[0] // self.heads[1]

    def __str__(self) -> str:
        short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        step = f"{self.chunks}x{self.chunk}"
        kv = " fp8 kv" if self.eight_bits else ""
        return f"{self.heads[0]}/{self.heads[1]} D{self.head_dim} page {self.block_size} {step} {short}{kv}"


def _ids(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _blocks(geometry: Geometry) -> QueryBlocks:
    tokens = geometry.chunks * geometry.chunk
    rows = block_rows(tokens, geometry.chunks, geometry.group, geometry.head_dim)
    capacity = block_capacity(tokens, geometry.chunks, geometry.group, rows)
    entries = torch.empty(capacity, 2, dtype=torch.int32, device="meta")
    return QueryBlocks(entries, torch.empty(1, dtype=torch.int32, device="meta"), rows, geometry.group)


def _query_blocks(geometry: Geometry) -> Launch:
    tokens = geometry.chunks * geometry.chunk
    return query_blocks_launch(_ids(geometry.chunks + 1), _ids(geometry.chunks), tokens, _blocks(geometry))


def _attention(
    geometry: Geometry,
    splits: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    causal: bool = True,
) -> Launch:
    heads, kv_heads = geometry.heads
    dim, dtype, tokens = geometry.head_dim, geometry.dtype, geometry.chunks * geometry.chunk
    packed = torch.empty(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype, device="meta")
    q = packed[:, : heads * dim].unflatten(1, (heads, dim))
    if geometry.eight_bits:
        q = q.to(torch.float16)
    layer = geometry.block_size * 2 * kv_heads * dim
    stored = EIGHT_BITS if geometry.eight_bits else dtype
    pool = torch.empty(POOL_BLOCKS, LAYERS * layer, dtype=stored, device="meta")
    sums = None
    out = torch.empty(tokens, heads, dim, dtype=dtype, device="meta")
    if splits > 1:
        sums = torch.empty(splits, tokens, heads, device="meta")
        out = torch.empty(splits, tokens, heads, dim, device="meta")
    # Where attention is not causal, it is the first of two parts that are joined by their sums.
    lse = None if causal else torch.empty(tokens, heads, device="meta")
    return prefill_attention_launch(
        q,
        pool[:, :layer].unflatten(1, (geometry.block_size, 2, kv_heads, dim)),
        _ids(SLOTS, TABLE_WIDTH),
        _ids(geometry.chunks),
        _ids(geometry.chunks + 1),
        _ids(geometry.chunks),
        _blocks(geometry),
        dim**-0.5,
        out,
        window,
        softcap,
        torch.empty(heads, dtype=dtype, device="meta") if sinks else None,
        lse=lse,
        sums=sums,
        causal=causal,
    )


def _merge(splits: int, head_dim: int) -> Launch:
    tokens, heads = 64, 32
    partial = torch.empty(splits, tokens, heads, head_dim, device="meta")
    sums = torch.empty(splits, tokens, heads, device="meta")
    out = torch.empty(tokens, heads, head_dim, dtype=torch.bfloat16, device="meta")
    return merge_parts_launch(partial, sums, _ids(2), out)


def _attention_cases(geometry: Geometry, **options) -> list[Case]:
    """One case for the architectures whose blocks are long enough for the units of a warp group, one for the
    others."""
    name = (
        f"prefill_attention {geometry} {' '.join(f'{key}={value}' for key, value in options.items())}".strip()
    )

    def launch() -> Launch:
        return _attention(geometry, **options)

    mean = geometry.chunk * geometry.group
    # Heads must begin at multiples of 16 bytes.
    tensor_loads = (
        geometry.block_size >= 64 and geometry.head_dim * (1 if geometry.eight_bits else 2) % 16 == 0
    )
    newer = tuple(a for a in ARCHITECTURES if a >= HOPPER)
    older = tuple(a for a in ARCHITECTURES if a < HOPPER)
    units = mean > WARP_GROUP_ROWS // 2
    found = [Case(name, launch, newer, NARROW_LOADS, units, tensor_loads)]
    if not geometry.eight_bits:
        found.append(Case(name, launch, older, NARROW_LOADS))
    return found


MODELS = (
    (32, 8, 128),
    (32, 8, 64),
    (16, 8, 256),
    (28, 4, 128),
    (9, 3, 64),
    (32, 32, 96),
    (32, 32, 80),
    (4, 2, 8),
)
"""Heads of queries, of keys, and their size."""

SHORT = ((4, 16), (8, 8), (8, 4))
"""Chunks and tokens of each: 64, 32 and 16 packed rows with 4 heads to a group."""

SHARED = ((1, 64), (2, 16), (4, 4))
"""Prefixes, and requests that share each: 128, 64 and 16 packed rows of a block."""


def cases() -> list[Case]:
    found = []
    for heads, kv_heads, dim in MODELS:
        for page in (16, 64):
            found += _attention_cases(Geometry((heads, kv_heads), dim, page))
            found += _attention_cases(Geometry((heads, kv_heads), dim, page, eight_bits=True))
    for page in (16, 64):
        for dim in (64, 128, 256):
            geometry = Geometry((32, 8), dim, page)
            found += _attention_cases(geometry, window=4096)
            found += _attention_cases(geometry, window=128, softcap=50.0, sinks=True)
            eight_bits = replace(geometry, eight_bits=True)
            found += _attention_cases(eight_bits, window=128, softcap=50.0, sinks=True)
            for chunks, chunk in SHORT:
                found += _attention_cases(Geometry((32, 8), dim, page, chunks, chunk))
                found += _attention_cases(Geometry((32, 8), dim, page, chunks, chunk), splits=4)
                short = Geometry((32, 8), dim, page, chunks, chunk, eight_bits=True)
                found += _attention_cases(short)
                found += _attention_cases(short, splits=4)
        found += _attention_cases(Geometry((32, 8), 128, page), splits=4)
        found += _attention_cases(Geometry((32, 8), 128, page), softcap=50.0)
        found += _attention_cases(Geometry((64, 8), 64, page), window=128, sinks=True)
        found += _attention_cases(Geometry((32, 8), 128, page, dtype=torch.float16))
    for dim in (64, 128, 256):
        found.append(Case(f"merge_parts 16 D{dim}", lambda d=dim: _merge(16, d)))
    for page in (16, 64):
        for dim in (64, 128, 256):
            for chunks, chunk in SHARED:
                for eight_bits in (False, True):
                    shared = Geometry((32, 8), dim, page, chunks, chunk, eight_bits=eight_bits)
                    found += _attention_cases(shared, splits=4, causal=False)
        found += _attention_cases(Geometry((32, 8), 128, page, 1, 512), causal=False)
        found += _attention_cases(Geometry((16, 8), 256, page, 1, 64), softcap=50.0, causal=False)
    for group in (1, 4, 7):
        geometry = Geometry((8 * group, 8), 128, 16, chunks=8, chunk=256)
        found.append(Case(f"query_blocks {geometry}", lambda g=geometry: _query_blocks(g)))
    return found
