"""Blocks of the KV pools, scattered over both, copied in one launch.

Each copy between device and host that is given to the copy engines costs the processor time; here any number
of blocks costs one launch. Pinned host memory has an address on the device too, so that either side may be
the host's. Large blocks are better left to the copy engines, which keep no multiprocessor busy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chiron_kernels.gpu.checks import check_device, check_dtype, check_last_dense, check_shape
from chiron_kernels.gpu.launch import Launch

ALIGNMENT = 64
"""Bytes that a block is a multiple of."""
NUM_WARPS = 4
WORD = torch.int32
"""What blocks are copied as: of 4 bytes, so that 64 bytes are 16 of them, the divisor by which Triton tells
that loads and stores of 16 bytes are aligned."""
PIECE_WORDS = NUM_WARPS * 32 * 4 * 4
"""What a program copies: four loads of 16 bytes a thread before the first store, as reads over PCIe return
late. A piece is 8 KiB."""


@triton.jit(do_not_specialize_on_alignment=["source_rows", "target_rows"])
def _copy_blocks(
    source,  # int32 [blocks, words]
    source_rows,  # int64 [count]; not read if SOURCE_DENSE
    target,  # int32 [blocks, words] out
    target_rows,  # int64 [count]; not read if TARGET_DENSE
    words,
    source_stride,
    target_stride,
    SOURCE_DENSE: tl.constexpr,  # block i of the copy is row i
    TARGET_DENSE: tl.constexpr,
    PIECE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    source_row = index if SOURCE_DENSE else tl.load(source_rows + index)
    target_row = index if TARGET_DENSE else tl.load(target_rows + index)
    word = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = word < words
    value = tl.load(source + source_row * source_stride + word, mask=inside)
    tl.store(target + target_row * target_stride + word, value, mask=inside)


def _check_blocks(name: str, blocks: torch.Tensor, size: int | None, rows: torch.Tensor) -> None:
    """uint8 [blocks, size], on the device of `rows` or in pinned memory."""
    check_shape(name, blocks, (None, size))
    check_dtype(name, blocks, (torch.uint8,))
    check_last_dense(name, blocks)
    if blocks.shape[1] % ALIGNMENT:
        raise ValueError(
            f"{name} has blocks of {blocks.shape[1]} bytes; they must be multiples of {ALIGNMENT}"
        )
    if blocks.stride(0) % ALIGNMENT or blocks.storage_offset() % ALIGNMENT:
        raise ValueError(
            f"{name} has blocks {blocks.stride(0)} bytes apart from {blocks.storage_offset()} on; "
            f"both must be multiples of {ALIGNMENT}"
        )
    if blocks.device != rows.device and not blocks.is_pinned():
        raise ValueError(f"{name} is on {blocks.device}; it must be on {rows.device} or in pinned memory")


def _check_rows(name: str, rows: torch.Tensor, count: int) -> None:
    check_shape(name, rows, (count,))
    check_dtype(name, rows, (torch.int64,))
    check_last_dense(name, rows)


def copy_blocks_launch(
    source: torch.Tensor,
    source_rows: torch.Tensor | None,
    target: torch.Tensor,
    target_rows: torch.Tensor | None,
) -> Launch:
    """As `copy_blocks`; without source_rows or target_rows, not both, block i is row i there."""
    rows = target_rows if source_rows is None else source_rows
    if rows is None:
        raise ValueError("neither source_rows nor target_rows is given; one must be")
    check_shape("source_rows" if source_rows is not None else "target_rows", rows, (None,))
    count = rows.shape[0]
    for name, given in (("source_rows", source_rows), ("target_rows", target_rows)):
        if given is not None:
            _check_rows(name, given, count)
    check_device(rows, source_rows=source_rows, target_rows=target_rows)
    _check_blocks("source", source, None, rows)
    _check_blocks("target", target, source.shape[1], rows)
    for name, given, blocks in (("source", source_rows, source), ("target", target_rows, target)):
        if given is None and blocks.shape[0] < count:
            raise ValueError(f"{name} has {blocks.shape[0]} blocks; it must have {count} or more")
    from_words, to_words = source.view(WORD), target.view(WORD)
    words = from_words.shape[1]
    return Launch(
        _copy_blocks,
        (count, -(-words // PIECE_WORDS)),
        {
            "source": from_words,
            "source_rows": rows if source_rows is None else source_rows,
            "target": to_words,
            "target_rows": rows if target_rows is None else target_rows,
            "words": words,
            "source_stride": from_words.stride(0),
            "target_stride": to_words.stride(0),
            "SOURCE_DENSE": source_rows is None,
            "TARGET_DENSE": target_rows is None,
            "PIECE": PIECE_WORDS,
        },
        num_warps=NUM_WARPS,
        num_stages=1,
    )


def copy_blocks(
    source: torch.Tensor, source_rows: torch.Tensor, target: torch.Tensor, target_rows: torch.Tensor
) -> None:
    """target[target_rows[i]] = source[source_rows[i]] for all i, in no order.

    source, target: uint8 [blocks, bytes], bytes a multiple of 64, on the device of the rows or in pinned host
    memory. source_rows, target_rows: int64 [count], rows that are there, no target twice and no target that
    is a source of the same memory: this is not checked. Raises ValueError for what does not fit."""
    copy_blocks_launch(source, source_rows, target, target_rows).run()


def gather_blocks(source: torch.Tensor, source_rows: torch.Tensor, buffer: torch.Tensor) -> None:
    """buffer[i] = source[source_rows[i]]: scattered blocks into a dense buffer. As `copy_blocks`."""
    copy_blocks_launch(source, source_rows, buffer, None).run()


def scatter_blocks(buffer: torch.Tensor, target: torch.Tensor, target_rows: torch.Tensor) -> None:
    """target[target_rows[i]] = buffer[i]: a dense buffer into scattered blocks. As `copy_blocks`."""
    copy_blocks_launch(buffer, None, target, target_rows).run()
