"""What the prefill attention is launched with, by shapes alone, and what its arguments must be."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from chiron_kernels.gpu.checks import FLOATS, HALVES, check_contiguous, check_device, check_dtype, check_shape
from chiron_kernels.gpu.launch import HOPPER, power_of_two_from
from chiron_kernels.gpu.merge_parts import MOST_SPLITS
from chiron_kernels.gpu.paged_kv import EIGHT_BITS, STORED, check_kv, check_tables
from chiron_kernels.gpu.query_blocks import QueryBlocks

LEAST_SPLIT_KEYS = 512
"""Under this a split costs more to join than it saves."""

LEAST_SHARED_KEYS = 2 * LEAST_SPLIT_KEYS
"""From so many keys on a block may be split."""

TENSOR_ALIGNMENT = 16
"""Bytes."""

UNHURRIED, MOST_REGISTERS = 168, 255
"""Registers of a thread: left alone, the assembler keeps to fewer, so that one more program fits a
multiprocessor, and some configurations spill."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """keys: of a tile. stages: depth of the pipeline over unmasked tiles. by_tensor: these are loaded by
    tensor copies, for which a tile must lie in one block. registers: of a thread; None leaves them to the
    assembler."""

    keys: int
    warps: int
    stages: int
    by_tensor: bool
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """Sizes that arguments share, known to the host."""

    tokens: int
    chunks: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def tiling(
    shape: PrefillShape, rows: int, kv: torch.Tensor, architecture: int, causal: bool = True
) -> Tiling:
    """The tiles for blocks of `rows`: found by compiling, the largest and the deepest pipeline that spill no
    registers."""
    tile = _causal_tiling(shape, rows, kv, architecture)
    if causal:
        return tile
    # There are few rows, whose keys are dealt to programs that fill the GPU once: room for one more on a
    # multiprocessor is not worth a spill.
    tile = replace(tile, registers=MOST_REGISTERS)
    if shape.head_dim > 128 and kv.dtype == EIGHT_BITS and tile.by_tensor:
        return replace(tile, keys=16)
    return tile


def _causal_tiling(shape: PrefillShape, rows: int, kv: torch.Tensor, architecture: int) -> Tiling:
    dim = power_of_two_from(shape.head_dim)
    if kv.dtype == torch.float32:
        return Tiling(keys=16, warps=8 if rows > 32 else 4, stages=1, by_tensor=False)
    if architecture < HOPPER:
        short = rows < (64 if dim <= 128 else 32)
        keys = 64 if short or dim <= 64 else 32
        warps = 8 if dim > 64 or rows >= 64 else 4
        registers = UNHURRIED if dim <= 64 and warps == 4 else None
        return Tiling(keys, warps, 2 if short and dim > 128 else 3, by_tensor=False, registers=registers)
    keys = 64 if dim <= 128 else 32
    by_tensor = shape.block_size >= keys and aligned_for_tensor_copies(kv)
    converts = kv.dtype == EIGHT_BITS and not by_tensor
    warps = 8 if rows > 64 or (dim > 128 and rows > (16 if converts else 32)) else 4
    spills = dim <= 64 and rows == 32 and not by_tensor
    registers = None
    if dim <= 64 and (converts or (architecture > HOPPER and warps == 8)):
        registers = UNHURRIED
    elif dim > 128 and warps == 4 and kv.dtype == EIGHT_BITS:
        registers = MOST_REGISTERS
    return Tiling(keys, warps, 2 if spills else 3, by_tensor, registers)


def aligned_for_tensor_copies(kv: torch.Tensor) -> bool:
    """Whether addresses and strides are multiples of 16 bytes, as tensor copies need."""
    strides = (stride * kv.element_size() for stride in kv.stride()[:-1])
    return kv.data_ptr() % TENSOR_ALIGNMENT == 0 and all(s % TENSOR_ALIGNMENT == 0 for s in strides)


def choose_splits(
    shape: PrefillShape,
    blocks: int,
    table_width: int,
    max_len: int | None,
    window: int | None,
    multiprocessors: int,
) -> int:
    """Programs that share the keys of a block: more than one where the blocks alone would leave some of the
    GPU's multiprocessors idle and there are keys to share. blocks: the most there may be."""
    if max_len is not None and max_len < 0:
        raise ValueError(f"max_len is {max_len}; it must be 0 or more")
    keys = table_width * shape.block_size
    if max_len is not None:
        keys = min(keys, max_len)
    if window is not None:
        keys = min(keys, window)
    programs = max(blocks * shape.kv_heads, 1)
    return max(1, min(multiprocessors // programs, keys // LEAST_SPLIT_KEYS, MOST_SPLITS))


def check_out(q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor, sums: torch.Tensor | None) -> None:
    """out: as q, or of 16 bits where kv is of 8; with sums, float32 [P, T, Hq], a float32 result for each of
    the P splits."""
    if sums is None:
        check_shape("out", out, tuple(q.shape))
        check_dtype("out", out, HALVES if kv.dtype == EIGHT_BITS else (q.dtype,))
    else:
        check_shape("sums", sums, (None, *q.shape[:2]))
        check_shape("out", out, (sums.shape[0], *q.shape))
        for name, tensor in (("sums", sums), ("out", out)):
            check_dtype(name, tensor, (torch.float32,))
        check_contiguous("sums", sums)
        if sums.shape[0] < 1:
            raise ValueError(f"sums is {list(sums.shape)}; it must have a split at least")
    check_contiguous("out", out)
    check_device(q, out=out, sums=sums)


def check_arguments(
    q: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    table_rows: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    blocks: QueryBlocks,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None,
    causal: bool = True,
) -> PrefillShape:
    """The sizes of arguments that fit one another. Raises ValueError, which names the one that does not."""
    check_shape("q", q, (None, None, None))
    check_dtype("q", q, FLOATS)
    tokens, heads, head_dim = q.shape
    if q.stride(2) != 1 or (heads > 1 and q.stride(1) != head_dim):
        raise ValueError(f"q has strides {list(q.stride())}; those within a row must be [{head_dim}, 1]")
    check_kv(kv, STORED)
    check_dtype("kv", kv, (q.dtype, EIGHT_BITS) if q.dtype in HALVES else (q.dtype,))
    block_size, kv_heads = kv.shape[1], kv.shape[3]
    if kv.shape[4] != head_dim:
        raise ValueError(f"kv has heads of {kv.shape[4]}; they must be of {head_dim}, as those of q")
    if heads < 1 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads; they must be a multiple of the {kv_heads} of kv")
    check_shape("context_lens", context_lens, (None,))
    shape = PrefillShape(tokens, context_lens.shape[0], heads, kv_heads, head_dim, block_size)
    check_tables(tables)
    check_shape("table_rows", table_rows, (shape.chunks,))
    check_shape("query_starts", query_starts, (shape.chunks + 1,))
    indexes = {"table_rows": table_rows, "query_starts": query_starts, "context_lens": context_lens}
    for name, tensor in indexes.items():
        check_dtype(name, tensor, (torch.int64,))
        check_contiguous(name, tensor)
    if blocks.group != shape.group:
        raise ValueError(f"blocks are for groups of {blocks.group} heads; they must be for {shape.group}")
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be above 0")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be 1 or more")
    if window is not None and not causal:
        raise ValueError(f"window is {window}; where attention is not causal it must be None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0")
    if sinks is not None:
        check_shape("sinks", sinks, (heads,))
        check_dtype("sinks", sinks, FLOATS)
        check_contiguous("sinks", sinks)
    if lse is not None:
        check_shape("lse", lse, (tokens, heads))
        check_dtype("lse", lse, (torch.float32,))
        check_contiguous("lse", lse)
    check_device(q, kv=kv, tables=tables, **indexes, sinks=sinks, lse=lse, blocks=blocks.entries)
    return shape
