"""Keys and values of new tokens into the paged pool."""

from __future__ import annotations

import pytest
import torch
from chiron_kernels.gpu.kv_write import kv_write
from chiron_kernels.reference.kv_write import kv_write as reference_kv_write
from chiron_kernels.torch_kv import write_kv

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rows_and_pool(
    rows: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """k and v are parts of one packed tensor, kv the middle one of three layers; the pool holds NaN."""
    generator = torch.Generator().manual_seed(rows * dim)
    packed = torch.randn(rows, 3 * kv_heads, dim, generator=generator).to(device, dtype)
    num_blocks = max(rows, 3)
    layers = torch.full((num_blocks, 3, block_size, 2, kv_heads, dim), torch.nan, dtype=dtype, device=device)
    places = torch.randperm(num_blocks * block_size, generator=generator)[:rows].to(device)
    k, v = packed[:, kv_heads : 2 * kv_heads], packed[:, 2 * kv_heads :]
    return k, v, layers[:, 1], places // block_size, places % block_size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "kv_heads", "dim", "block_size"),
    [(1, 1, 1, 1), (9, 3, 64, 16), (5, 1, 80, 4), (2, 2, 256, 64), (3, 32, 96, 4)],
)
@pytest.mark.parametrize("write", [kv_write, reference_kv_write])
def test_writes_what_torch_writes(
    rows: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype, write, device: torch.device
) -> None:
    k, v, kv, blocks, offsets = rows_and_pool(rows, kv_heads, dim, block_size, dtype, device)
    blocks[rows // 2 :: 4] = -1
    expected = kv.clone()
    kept = blocks >= 0
    write_kv(expected, k[kept], v[kept], blocks[kept], offsets[kept])
    write(k, v, kv, blocks, offsets)
    torch.testing.assert_close(kv, expected, rtol=0, atol=0, equal_nan=True)
    kv.fill_(torch.nan)
    assert torch.empty(0, dtype=dtype, device=device).set_(kv.untyped_storage()).isnan().all()


def test_heads_may_lie_anyhow(device: torch.device) -> None:
    k, v, kv, blocks, offsets = rows_and_pool(4, 3, 16, 4, torch.float16, device)
    kv_write(k.transpose(0, 1).contiguous().transpose(0, 1), v, kv, blocks, offsets)
    assert torch.equal(kv[blocks, offsets], torch.stack((k, v), dim=1))


def test_no_rows(device: torch.device) -> None:
    k, v, kv, blocks, offsets = rows_and_pool(0, 2, 16, 4, torch.float16, device)
    kv_write(k, v, kv, blocks, offsets)
    assert kv.isnan().all()


def test_blocks_far_apart(device: torch.device) -> None:
    """The last block begins past 2^31 elements. Only what is touched takes memory on the CPU."""
    k, v, kv, _, offsets = rows_and_pool(2, 2, 64, 4, torch.float16, device)
    stride = 2**31 // 2 + 64
    memory = torch.empty(2 * stride + kv[0].numel(), dtype=kv.dtype, device=device)
    far = memory.as_strided((3, *kv.shape[1:]), (stride, *kv.stride()[1:]))
    far.fill_(0)
    blocks = torch.tensor([0, 2], device=device)
    kv_write(k, v, far, blocks, offsets)
    assert torch.equal(far[blocks, offsets], torch.stack((k, v), dim=1))
    far[blocks, offsets] = 0
    assert not far.any()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("k", lambda x: x.flatten(1), r"k is \[3, 128\]; it must be \[any, any, any\]"),
        ("k", lambda x: x.double(), "k is float64"),
        ("k", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "k has stride"),
        ("v", lambda x: x[:2], r"v is \[2, 2, 64\]; it must be \[3, 2, 64\]"),
        ("v", lambda x: x.float(), "v is float32; it must be float16"),
        ("v", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "v has stride"),
        ("v", lambda x: x.to("meta"), "v is on meta"),
        ("kv", lambda x: x[:, :, :1], r"kv is \[3, 4, 1, 2, 64\]"),
        ("kv", lambda x: x.bfloat16(), "kv is bfloat16; it must be float16"),
        ("kv", lambda x: x.repeat(1, 1, 1, 2, 1)[:, :, :, ::2], "kv has strides"),
        ("kv", lambda x: x.to("meta"), "kv is on meta"),
        ("write_blocks", lambda x: x[:2], r"write_blocks is \[2\]; it must be \[3\]"),
        ("write_blocks", lambda x: x.to("meta"), "write_blocks is on meta"),
        ("write_offsets", lambda x: x.int(), "write_offsets is int32; it must be int64"),
    ],
)
def test_bad_arguments_are_named(name: str, change, says: str, device: torch.device) -> None:
    names = ("k", "v", "kv", "write_blocks", "write_offsets")
    given = dict(zip(names, rows_and_pool(3, 2, 64, 4, torch.float16, device), strict=True))
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=says):
        kv_write(**given)


def test_more_slots_than_a_grid_holds_are_refused() -> None:
    k = torch.empty(1, 1, 8, dtype=torch.float16, device="meta").expand(2**28, 8, 8)
    kv = torch.empty(1, 1, 2, 8, 8, dtype=torch.float16, device="meta")
    places = torch.empty(2**28, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="268435456 rows of 8 heads"):
        kv_write(k, k, kv, places, places)
