"""Decode attention over prefixes that requests share, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chiron_kernels.gpu import prefill_plan
from chiron_kernels.gpu.cascade_attention import cascade_attention, cascade_step
from chiron_kernels.reference.cascade_attention import cascade_attention as reference_cascade_attention

from tests.chiron_kernels.gpu.cascade_batch import attend, check_cascade, make_shared, step_of
from tests.chiron_kernels.gpu.decode_batch import RELATIVE, assert_close, make_batch
from tests.chiron_kernels.gpu.eight_bit_gpus import needs_8_bits


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("block_size", [1, 16, 32, 64, 128])
def test_equals_the_reference(block_size: int, dtype: torch.dtype, device: torch.device) -> None:
    lens = [3 * block_size + 1, 3 * block_size + 70, 4 * block_size]
    check_cascade(lens, [((0, 1, 2), 3)], device, block_size=block_size, dtype=dtype)


@pytest.mark.parametrize("block_size", [16, 64])
def test_groups_beside_requests_without_one(block_size: int, device: torch.device) -> None:
    """Members in any order, a request alone in its group, one that is short, one without keys."""
    lens = [9 * block_size, 2 * block_size + 5, 7, 8 * block_size + 1, 2 * block_size + 1, 0, 3 * block_size]
    check_cascade(lens, [((4, 1), 2), ((3, 0), 8), ((6,), 1)], device, block_size=block_size)


@pytest.mark.parametrize("members", [2, 5, 17, 40])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_groups_of_many(members: int, group: int, device: torch.device) -> None:
    """Rows of less than a block of queries, and of several."""
    lens = [33 + 3 * number for number in range(members)]
    check_cascade(lens, [(range(members), 2)], device, heads=group, kv_heads=1, block_size=16)


@pytest.mark.parametrize("head_dim", [18, 64, 80, 128, 256])
def test_head_sizes(head_dim: int, device: torch.device) -> None:
    check_cascade([70, 69, 90, 12], [((0, 2), 4)], device, head_dim=head_dim, block_size=16)


@pytest.mark.parametrize("dtype", RELATIVE)
def test_softcap_and_sinks_count_once(dtype: torch.dtype, device: torch.device) -> None:
    sinks = torch.linspace(-3, 6, 8, device=device).to(dtype)
    lens, groups = [130, 70, 200, 129], [((0, 2, 3), 2)]
    check_cascade(lens, groups, device, dtype=dtype, softcap=2.5, sinks=sinks)
    check_cascade(lens, groups, device, dtype=dtype, sinks=sinks)


@needs_8_bits
@pytest.mark.parametrize(
    ("q_dtype", "head_dim"), [(torch.float16, 64), (torch.bfloat16, 64), (torch.float16, 256)]
)
@pytest.mark.parametrize("block_size", [16, 64])
def test_keys_and_values_of_8_bits(
    block_size: int, q_dtype: torch.dtype, head_dim: int, device: torch.device
) -> None:
    shape = {"block_size": block_size, "head_dim": head_dim, "dtype": torch.float8_e4m3fn}
    batch = make_batch([130, 70, 200, 129], device, **shape)
    batch.q = batch.q.to(q_dtype)
    step = step_of(batch, make_shared(batch, [((0, 2, 3), 128 // block_size)]))
    scales = {"k_scale": 0.5, "v_scale": 3.0}
    assert_close(attend(batch, step, **scales), batch.exact(**scales), q_dtype)


@pytest.mark.parametrize("block_size", [16, 64])
def test_both_parts_in_splits(block_size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_plan, "LEAST_SPLIT_KEYS", 64)
    blocks = 256 // block_size
    check_cascade([600, 257, 430], [((0, 2), blocks)], device, programs=1000, block_size=block_size)


def test_one_token_is_the_least_that_is_left(device: torch.device) -> None:
    check_cascade([65, 129], [((0, 1), 1)], device, block_size=64)


def test_the_last_slot_of_a_full_table(device: torch.device) -> None:
    """What is left of it ends with the last entry of the tables, of which not one is spare."""
    batch = make_batch([64, 64], device, block_size=16)
    batch.tables = batch.tables[:, :4].contiguous()
    batch.tables[[-1, -2]] = batch.tables[batch.table_rows]
    last = len(batch.tables)
    batch.table_rows = torch.tensor([last - 1, last - 2], device=device)
    step = step_of(batch, make_shared(batch, [((0, 1), 3)]))
    assert_close(attend(batch, step), batch.exact(), batch.q.dtype)


def test_as_many_tokens_later(device: torch.device) -> None:
    """The groups stay as they were while requests grow."""
    batch = make_batch([150, 180, 90], device, block_size=16)
    shared = make_shared(batch, [((0, 1), 5)])
    batch.lens -= 20
    for _ in range(2):
        assert_close(attend(batch, step_of(batch, shared)), batch.exact(), batch.q.dtype)
        batch.lens += 20


def test_the_reference_of_the_same_arguments(device: torch.device) -> None:
    batch = make_batch([40, 70, 35, 90], device, block_size=16)
    step = step_of(batch, make_shared(batch, [((3, 0), 2), ((1, 2), 1)]))
    lse = torch.empty(batch.q.shape[:2], device=device)
    q = batch.q.double()
    out = reference_cascade_attention(q, batch.kv, step, batch.scale, 2.0, lse=lse)
    exact = batch.exact(softcap=2.0)
    assert torch.equal(out, exact[0]) and torch.equal(lse, exact[1])


def test_lengths_beyond_the_table_count_as_what_it_holds(device: torch.device) -> None:
    batch = make_batch([64, 64], device, block_size=16)
    batch.tables = batch.tables[:, :4].contiguous()
    shared = make_shared(batch, [((0, 1), 2)])
    exact = batch.exact()
    batch.lens += torch.tensor([1, 2**40], device=device)
    assert_close(attend(batch, step_of(batch, shared)), exact, batch.q.dtype)


def test_nothing_is_written_where_arguments_are_wrong(device: torch.device) -> None:
    batch = make_batch([40, 70], device, block_size=16)
    step = step_of(batch, make_shared(batch, [((0, 1), 2)]))
    out = torch.zeros_like(batch.q, memory_format=torch.contiguous_format)
    with pytest.raises(ValueError, match=r"scale is 0\.0; it must be above 0"):
        cascade_attention(batch.q, batch.kv, step, 0.0, out=out)
    assert not out.any()


def test_writes_where_it_is_told_to(device: torch.device) -> None:
    batch = make_batch([40, 70], device, block_size=16)
    step = step_of(batch, make_shared(batch, [((0, 1), 2)]))
    there = torch.full((5, *batch.q.shape[1:]), torch.nan, dtype=batch.q.dtype, device=device)
    inputs = (batch.q, batch.kv, step, batch.scale)
    out = cascade_attention(*inputs, out=there[3:])
    assert out.data_ptr() == there[3:].data_ptr() and there[:3].isnan().all()
    assert torch.equal(out, cascade_attention(*inputs))


def test_queries_of_another_step_are_named(device: torch.device) -> None:
    batch = make_batch([40, 70], device, block_size=16)
    step = step_of(batch, make_shared(batch, [((0, 1), 2)]))
    with pytest.raises(ValueError, match=r"q is \[1, 8, 64\]; it must be \[2, any, any\]"):
        cascade_attention(batch.q[:1], batch.kv, step, batch.scale)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"members": torch.tensor([0, 1], dtype=torch.int32)}, "shared.members is int32; it must be int64"),
        ({"starts": torch.tensor([0])}, r"shared.starts is \[1\]; it must be \[2\]"),
        ({"lens": torch.tensor([32, 32])}, r"shared.lens is \[2\]; it must be \[1\]"),
        ({"skipped": torch.tensor([32])}, r"shared.skipped is \[1\]; it must be \[3\]"),
        ({"everyone": True}, r"shared.members is \[2\]; it must be \[3\]"),
        ({"members": torch.arange(4)}, "shared has 4 members; there are 3 requests"),
        ({"longest": 40}, "shared has a longest prefix of 40 keys; it must be 1 to 6 blocks of 16"),
        ({"longest": 0}, "shared has a longest prefix of 0 keys"),
        ({"longest": 160}, "shared has a longest prefix of 160 keys"),
        (
            {"table_rows": torch.arange(0), "starts": torch.arange(1), "lens": torch.arange(0)},
            "shared has no groups",
        ),
    ],
)
def test_bad_groups_are_named(change: dict, says: str, device: torch.device) -> None:
    batch = make_batch([40, 70, 5], device, block_size=16)
    shared = make_shared(batch, [((0, 1), 2)])
    moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in change.items()}
    with pytest.raises(ValueError, match=says):
        step_of(batch, replace(shared, **moved))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": 3}, "heads is 3; it must be a multiple of the 2 of kv"),
        (
            {"tables": torch.zeros(0, 4, dtype=torch.int64)},
            r"tables is \[0, 4\]; it must have a row at least",
        ),
        ({"lens": torch.zeros(3, dtype=torch.int32)}, "lens is int32; it must be int64"),
        ({"table_rows": torch.zeros(2, dtype=torch.int64)}, r"table_rows is \[2\]; it must be \[3\]"),
    ],
)
def test_bad_arguments_of_a_step_are_named(change: dict, says: str, device: torch.device) -> None:
    batch = make_batch([40, 70, 5], device, block_size=16)
    arguments = {
        "shared": make_shared(batch, [((0, 1), 2)]),
        "lens": batch.lens,
        "kv": batch.kv,
        "tables": batch.tables,
        "table_rows": batch.table_rows,
        "heads": 8,
    }
    moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in change.items()}
    with pytest.raises(ValueError, match=says):
        cascade_step(**{**arguments, **moved})
