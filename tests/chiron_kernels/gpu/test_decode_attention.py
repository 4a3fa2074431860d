"""Decode attention over the paged pool, against float64."""

from __future__ import annotations

import pytest
import torch
from chiron_kernels.gpu import eight_bits, pool_tiles
from chiron_kernels.gpu.decode_attention import decode_attention, decode_attention_launch
from chiron_kernels.gpu.merge_splits import merge_splits_launch

from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.spec import LayerGeometry
from tests.chiron_kernels.gpu.decode_batch import RELATIVE, assert_close, assert_exact, make_batch
from tests.chiron_kernels.gpu.eight_bit_gpus import needs_8_bits

AMPERE = 80


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("block_size", [1, 4, 16, 32, 64, 128])
def test_equals_the_reference(block_size: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_exact(make_batch([0, 1, 130, 17], device, block_size=block_size, dtype=dtype))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_lengths_around_those_of_blocks_and_tiles(block_size: int, device: torch.device) -> None:
    lens = [length for middle in (16, 32, 64, 128) for length in (middle - 1, middle, middle + 1)]
    assert_exact(make_batch(lens, device, heads=2, kv_heads=1, block_size=block_size))


@pytest.mark.parametrize("head_dim", [2, 18, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 64])
def test_head_sizes(head_dim: int, block_size: int, device: torch.device) -> None:
    assert_exact(make_batch([70, 33], device, head_dim=head_dim, block_size=block_size))


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 16])
def test_query_heads_of_a_key_head(group: int, device: torch.device) -> None:
    assert_exact(make_batch([70, 33], device, heads=2 * group, query_len=2))


@pytest.mark.parametrize("query_len", range(1, 9))
def test_several_new_tokens(query_len: int, device: torch.device) -> None:
    """The shortest requests hold fewer keys than there are queries: the first of these see none."""
    block_size = 64 if query_len % 2 else 16
    batch = make_batch([70, 3, 0, query_len, 128], device, block_size=block_size, query_len=query_len)
    assert_exact(batch)


def test_rows_of_more_than_one_tile(device: torch.device) -> None:
    assert_exact(make_batch([70, 140], device, heads=24, kv_heads=2, query_len=8), programs=4)


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("window", [1, 5, 64, 100, 1000])
def test_window(window: int, block_size: int, query_len: int, device: torch.device) -> None:
    batch = make_batch([0, 2, 65, 300], device, block_size=block_size, query_len=query_len)
    assert_exact(batch, window=window)


@pytest.mark.parametrize("block_size", [16, 64])
def test_what_a_window_has_left_behind_is_not_read(block_size: int, device: torch.device) -> None:
    batch = make_batch([300], device, block_size=block_size)
    expected = batch.exact(window=20)
    left = (300 - 20) // block_size
    batch.tables[batch.table_rows[0], :left] = 0
    assert_close(batch.attend(window=20), expected, batch.q.dtype)


@pytest.mark.parametrize("dtype", RELATIVE)
def test_softcap_and_sinks(dtype: torch.dtype, device: torch.device) -> None:
    batch = make_batch([0, 1, 70, 600], device, dtype=dtype, query_len=2)
    sinks = torch.linspace(-3, 6, 8, device=device).to(dtype)
    assert_exact(batch, programs=8, softcap=2.5, sinks=sinks)


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_sinks_that_are_none(lowest: float, window: int | None, device: torch.device) -> None:
    """Of heads without one, in rows that see nothing at all, or nothing of their first tile."""
    batch = make_batch([1, 66], device, query_len=3)
    sinks = torch.full((8,), lowest, device=device)
    assert_exact(batch, window=window, sinks=sinks)


def test_sinks_that_are_broken_show(device: torch.device) -> None:
    batch = make_batch([20], device)
    sinks = torch.zeros(8, device=device)
    sinks[3] = torch.nan
    out, lse = batch.attend(sinks=sinks)
    broken = [[head == 3 for head in range(8)]]
    assert out.isnan().all(dim=2).tolist() == broken and lse.isnan().tolist() == broken


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**40])
def test_windows_that_no_request_fills(window: int, device: torch.device) -> None:
    batch = make_batch([0, 1, 200], device, query_len=3)
    assert_close(batch.attend(window=window), batch.exact(), batch.q.dtype)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("query_len", "window"), [(1, None), (3, None), (1, 380), (3, 380)])
def test_splits_change_nothing(
    query_len: int, window: int | None, block_size: int, device: torch.device
) -> None:
    batch = make_batch([600, 0, 130, 410], device, block_size=block_size, query_len=query_len)
    one = batch.attend(programs=1, window=window)
    many = batch.attend(programs=1000, window=window)
    assert batch.splits(window, programs=1).requests[1].tolist() == [1, 1, 1, 1]
    assert batch.splits(window, programs=1000).requests[1].max() >= 3
    for found in (one, many):
        assert_close(found, batch.exact(window=window), batch.q.dtype)


def test_all_results_are_written(device: torch.device) -> None:
    """Of requests with and without splits, where there was NaN before."""
    batch = make_batch([600, 0, 20], device)
    splits = batch.splits(programs=8)
    out = torch.full(batch.q.shape, torch.nan, dtype=batch.q.dtype, device=device)
    lse = torch.full(out.shape[:2], torch.nan, device=device)
    partial = torch.full((splits.capacity, 2, 4, 64), torch.nan, device=device)
    partial_lse = torch.full(partial.shape[:3], torch.nan, device=device)
    decode_attention_launch(
        batch.q, batch.kv, batch.tables, batch.table_rows, batch.lens, splits, batch.scale, None, None, None,
        1, lse, 1.0, 1.0, out, partial, partial_lse,
    ).run()  # fmt: skip
    merge_splits_launch(partial, partial_lse, splits, out, lse).run()
    assert splits.requests[1].tolist() == [5, 1, 1]
    assert_close((out, lse), batch.exact(), batch.q.dtype)


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("window", [None, 70])
def test_blocks_by_their_address(
    block_size: int, window: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPUs before Hopper do it."""
    batch = make_batch([0, 33, 64, 200], device, block_size=block_size)
    by_descriptor = batch.attend(window=window)
    monkeypatch.setattr(pool_tiles, "target_architecture", lambda: AMPERE)
    by_address = batch.attend(window=window)
    assert_close(by_address, batch.exact(window=window), batch.q.dtype)
    assert_close(by_descriptor, by_address, batch.q.dtype)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("block_size", [16, 64])
def test_pool_of_more_elements_than_32_bits_count(
    block_size: int, architecture: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_tiles, "target_architecture", lambda: architecture)
    batch = make_batch([block_size + 3, 2 * block_size], device, block_size=block_size, head_dim=32)
    layers = [LayerGeometry(kv_heads=2, head_dim=32)] * 64
    stride = KvPool.block_bytes(block_size, layers, torch.float16) // 2
    last = 2**31 // stride + 8
    pool = KvPool(last + 1, block_size, layers, torch.float16, device)
    expected = batch.exact()
    far = pool.kv(63)
    used = batch.tables.unique()
    far[last - used] = batch.kv[used]
    batch.tables = last - batch.tables
    batch.kv = far
    assert_close(batch.attend(), expected, torch.float16)


def test_lengths_beyond_the_table_count_as_what_it_holds(device: torch.device) -> None:
    batch = make_batch([128, 128], device)
    batch.tables = batch.tables[:, :2].contiguous()
    expected = batch.exact()
    batch.lens += torch.tensor([1, 2**40], device=device)
    assert_close(batch.attend(), expected, batch.q.dtype)


def test_no_requests(device: torch.device) -> None:
    batch = make_batch([5], device)
    batch.q, batch.lens, batch.table_rows = batch.q[:0], batch.lens[:0], batch.table_rows[:0]
    out, lse = batch.attend()
    assert out.shape == (0, 8, 64) and lse.shape == (0, 8)


def test_lse_is_optional(device: torch.device) -> None:
    batch = make_batch([600, 20], device)
    out = decode_attention(
        batch.q, batch.kv, batch.tables, batch.table_rows, batch.lens, batch.splits(programs=8), batch.scale
    )
    torch.testing.assert_close(out.double(), batch.exact()[0], rtol=2e-3, atol=2e-3)


def test_writes_where_it_is_told_to(device: torch.device) -> None:
    batch = make_batch([600, 20], device)
    inputs = (batch.q, batch.kv, batch.tables, batch.table_rows, batch.lens, batch.splits(programs=8))
    there = torch.full((5, *batch.q.shape[1:]), torch.nan, dtype=batch.q.dtype, device=device)
    out = decode_attention(*inputs, batch.scale, out=there[3:])
    assert out.data_ptr() == there[3:].data_ptr() and there[:3].isnan().all()
    assert torch.equal(out, decode_attention(*inputs, batch.scale))
    with pytest.raises(ValueError, match="out is "):
        decode_attention(*inputs, batch.scale, out=there)


@needs_8_bits
@pytest.mark.parametrize("q_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 64])
def test_keys_and_values_of_8_bits(block_size: int, q_dtype: torch.dtype, device: torch.device) -> None:
    batch = make_batch([0, 70, 600, 1], device, block_size=block_size, dtype=torch.float8_e4m3fn)
    batch.q = batch.q.to(q_dtype)
    assert_exact(batch, programs=8, k_scale=0.5, v_scale=3.0)


def test_8_bits_before_there_were_any(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([70], device, dtype=torch.float8_e4m3fn)
    batch.q = batch.q.half()
    monkeypatch.setattr(eight_bits, "target_architecture", lambda: AMPERE)
    with pytest.raises(ValueError, match="kv is float8_e4m3fn; it must be float16"):
        batch.attend()
