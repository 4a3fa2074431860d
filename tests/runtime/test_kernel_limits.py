"""What Triton's kernels do not take is refused as an engine starts, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chiron_kernels.gpu.decode_plan import empty_splits
from chiron_kernels.gpu.decode_splits import decode_splits_launch
from chiron_kernels.gpu.kv_write import check_slots
from chiron_kernels.gpu.query_blocks import QueryBlocks, block_capacity, block_rows, query_blocks_launch
from chiron_kernels.gpu.step_limits import (
    LARGEST_VOCABULARY,
    MOST_DECODES,
    MOST_HEADS,
    MOST_KEYS,
    MOST_TOKENS,
)

from chiron_engine.config import EngineConfig
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.spec import LayerGeometry, ModelSpec
from chiron_engine.runtime.build import build_executor
from chiron_engine.runtime.kernel_limits import check_capacities, check_model

CONFIG = EngineConfig("m", kernels="triton", device="cpu", max_num_batched_tokens=1 << 16)
LIMITS = {"max_num_seqs": 32_768, "max_num_batched_tokens": 1_048_576, "max_model_len": 1_073_741_824}
SECOND_AXIS = 65_535


@pytest.mark.parametrize("name", LIMITS)
def test_capacities_over_the_limit_are_refused(name: str) -> None:
    most = LIMITS[name]
    check_capacities(replace(CONFIG, **{name: most}), Kernels.TRITON)
    over = replace(CONFIG, **{name: most + 1})
    check_capacities(over, Kernels.TORCH)
    with pytest.raises(ValueError, match=rf"{name} is {most + 1:,}; .* must be at most {most:,}"):
        check_capacities(over, Kernels.TRITON)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")
def test_an_engine_is_refused_before_its_model_is_looked_for() -> None:
    with pytest.raises(ValueError, match="max_num_seqs is 32,769"):
        build_executor(replace(CONFIG, max_num_seqs=32_769))


def test_a_vocabulary_over_the_limit_is_refused() -> None:
    spec = ModelSpec("large", "A", (LayerGeometry(1, 16),), LARGEST_VOCABULARY, 100, (), Path())
    check_model(spec, Kernels.TRITON)
    over = replace(spec, vocab_size=LARGEST_VOCABULARY + 1)
    check_model(over, Kernels.TORCH)
    with pytest.raises(ValueError, match=r"large has a vocabulary of 524,289 tokens; .* at most 524,288"):
        check_model(over, Kernels.TRITON)


@pytest.mark.parametrize("kv_heads", [1, 8])
def test_the_largest_batch_fits_a_grid(kv_heads: int) -> None:
    """Of tensors that take no memory. Short splits as in the worst case: as many as can be."""
    meta = torch.device("meta")
    kv = torch.empty(3, 64, 2, kv_heads, 128, dtype=torch.bfloat16, device=meta)
    lens = torch.empty(MOST_DECODES, dtype=torch.int64, device=meta)
    tables = torch.empty(MOST_DECODES, MOST_KEYS // 64, dtype=torch.int64, device=meta)
    splits = empty_splits(lens, kv, tables, 1, None, None)
    assert decode_splits_launch(lens, splits).grid == (MOST_DECODES,)
    assert MOST_DECODES < splits.capacity <= SECOND_AXIS


@pytest.mark.parametrize("heads", [(32, 8), (MOST_HEADS, 8), (71, 1)])
@pytest.mark.parametrize("chunks", [1, 1000, MOST_DECODES])
def test_the_largest_step_fits_a_grid(heads: tuple[int, int], chunks: int) -> None:
    group = heads[0] // heads[1]
    check_slots(MOST_TOKENS, heads[0])
    rows = block_rows(MOST_TOKENS, chunks, group, 128)
    meta = torch.device("meta")
    capacity = block_capacity(MOST_TOKENS, chunks, group, rows)
    blocks = QueryBlocks(
        torch.empty(capacity, 2, dtype=torch.int32, device=meta),
        torch.empty(1, dtype=torch.int32, device=meta),
        rows,
        group,
    )
    starts = torch.empty(chunks + 1, dtype=torch.int64, device=meta)
    grid = query_blocks_launch(starts, starts[1:], MOST_TOKENS, blocks).grid
    assert grid[1] <= SECOND_AXIS
    # Packed rows are counted in 32 bits.
    assert MOST_TOKENS * group < 2**31
