"""Between the columns of a trace and numpy arrays."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .prefix_blocks import PrefixBlocks
from .trace import Trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def make_trace(
    name: str,
    arrival_s: ArrayLike,
    prompt_tokens: ArrayLike,
    output_tokens: ArrayLike,
    prefix_blocks: Sequence[Sequence[int]] | None = None,
    prefix_block_tokens: int = 512,
) -> Trace:
    """A trace of equally long columns. The caller vouches for their content."""
    return Trace(
        name,
        _array("d", arrival_s, np.float64),
        _array("i", prompt_tokens, np.int32),
        _array("i", output_tokens, np.int32),
        prefix_blocks,
        prefix_block_tokens,
    )


def _array(typecode: str, values: ArrayLike, dtype: type[np.generic]) -> array:
    column = array(typecode)
    column.frombytes(np.ascontiguousarray(values, dtype=dtype).tobytes())
    return column


def arrivals_of(trace: Trace) -> Floats:
    return np.asarray(trace.arrival_s, dtype=np.float64)


def prompts_of(trace: Trace) -> Ints:
    return np.asarray(trace.prompt_tokens, dtype=np.int64)


def outputs_of(trace: Trace) -> Ints:
    return np.asarray(trace.output_tokens, dtype=np.int64)


def take_rows(trace: Trace, rows: Ints, arrival_s: Floats, name: str | None = None) -> Trace:
    """The named rows in the order given, at new arrivals (one a row, sorted)."""
    blocks = trace.prefix_blocks
    if blocks is not None:
        blocks = PrefixBlocks.of(blocks).take(rows)
    return make_trace(
        name or trace.name,
        arrival_s,
        prompts_of(trace)[rows],
        outputs_of(trace)[rows],
        blocks,
        trace.prefix_block_tokens,
    )
