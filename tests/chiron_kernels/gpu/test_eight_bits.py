"""Keys and values in a pool of 8 bits: scaled, rounded to nearest even, and never more than the largest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chiron_kernels.gpu import eight_bits
from chiron_kernels.gpu.kv_write import kv_write
from chiron_kernels.gpu.paged_kv import EIGHT_BITS
from chiron_kernels.gpu.rope_kv import rope_kv_write
from chiron_kernels.reference.kv_write import kv_write as reference_kv_write
from chiron_kernels.reference.rope_kv import rope_kv_write as reference_rope_kv_write

from tests.chiron_kernels.gpu.eight_bit_gpus import needs_8_bits

pytestmark = needs_8_bits
LARGEST = 448.0
WRITES = pytest.mark.parametrize("write", [kv_write, reference_kv_write])
ROPES = pytest.mark.parametrize("write", [rope_kv_write, reference_rope_kv_write])


def all_numbers(device: torch.device) -> torch.Tensor:
    """The 127 there are from 0 up, float32."""
    bits = torch.arange(0x7F, dtype=torch.uint8, device=device)
    return bits.view(EIGHT_BITS).float()


def empty_pool(kv_heads: int, dim: int, device: torch.device, blocks: int = 3) -> torch.Tensor:
    """The second of two layers, with blocks of 4 tokens, NaN all over."""
    shape = (blocks, 2, 4, 2, kv_heads, dim)
    return torch.full(shape, torch.nan, device=device).to(EIGHT_BITS)[:, 1]


def written(write: Any, values: torch.Tensor, k_scale: float = 1.0, v_scale: float = 1.0) -> torch.Tensor:
    """float32 [2, size]: what a pool holds of these numbers [size] as keys and as values."""
    kv = empty_pool(1, values.numel(), values.device)
    rows = values[None, None]
    place = torch.tensor([1], device=values.device)
    write(rows, rows, kv, place, place, k_scale, v_scale)
    return kv[1, 1, :, 0].float()


def same_bits(kv: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(kv.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@WRITES
def test_what_is_stored_is_read_as_it_was(write: Any, device: torch.device) -> None:
    numbers = all_numbers(device)
    numbers = torch.cat((numbers, -numbers))
    assert torch.equal(written(write, numbers), numbers.expand(2, -1))


@WRITES
def test_rounds_to_nearest_even(write: Any, device: torch.device) -> None:
    """Halfway between neighbours the one with an even fraction, just beside it the nearer one."""
    numbers = all_numbers(device)
    low, high = numbers[:-1], numbers[1:]
    middle = (low + high) / 2
    even = torch.where(torch.arange(middle.numel(), device=device) % 2 == 0, low, high)
    assert torch.equal(written(write, middle)[0], even)
    assert torch.equal(written(write, middle * (1 + 2**-20))[1], high)
    assert torch.equal(written(write, -middle * (1 - 2**-20))[1], -low)


@WRITES
def test_saturates_and_keeps_nan(write: Any, device: torch.device) -> None:
    given = torch.tensor([449.0, 463.9, 464.1, 500.0, 1e30, torch.inf, -465.0, -torch.inf], device=device)
    assert torch.equal(written(write, given), (given.sign() * LARGEST).expand(2, -1))
    assert torch.equal(written(write, given / 1e3, k_scale=1e-6)[0], given.sign() * LARGEST)
    assert written(write, torch.tensor([torch.nan, -torch.nan], device=device)).isnan().all()


@WRITES
def test_divides_by_the_scale(write: Any, device: torch.device) -> None:
    numbers = all_numbers(device)
    found = written(write, numbers * 8, k_scale=8.0, v_scale=16.0)
    assert torch.equal(found[0], numbers)
    assert torch.equal(found[1], (numbers / 2).to(EIGHT_BITS).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "kv_heads", "dim"), [(1, 1, 8), (9, 3, 64), (5, 1, 80), (2, 2, 256)])
def test_equals_the_reference(
    rows: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(rows * dim)
    k, v = (torch.randn(2, rows, kv_heads, dim, generator=generator) * 200).to(device, dtype)
    places = torch.randperm(12, generator=generator)[:rows].to(device)
    blocks, offsets = places // 4, places % 4
    blocks[1::4] = -1
    kv, expected = empty_pool(kv_heads, dim, device), empty_pool(kv_heads, dim, device)
    kv_write(k, v, kv, blocks, offsets, 0.37, 1.9)
    reference_kv_write(k, v, expected, blocks, offsets, 0.37, 1.9)
    assert same_bits(kv, expected)
    assert not expected.float().isnan().all()


def rope_arguments(norm: bool, rotary: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    rows, heads, kv_heads, dim = 5, 4, 2, 64
    generator = torch.Generator().manual_seed(rotary)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    half = torch.rand(rows, 1, rotary // 2, generator=generator) * 6
    places = torch.randperm(12, generator=generator)[:rows].to(device)
    return {
        "qkv": normal(rows, (heads + 2 * kv_heads) * dim),
        "cos": torch.cat((half.cos(), half.cos()), -1).to(device, dtype),
        "sin": torch.cat((-half.sin(), half.sin()), -1).to(device, dtype),
        "kv": empty_pool(kv_heads, dim, device),
        "write_blocks": places // 4,
        "write_offsets": places % 4,
        "heads": heads,
        "kv_heads": kv_heads,
        "q_norm": normal(dim) if norm else None,
        "k_norm": normal(dim) if norm else None,
        "eps": 1e-6,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("norm", "rotary"), [(False, 64), (True, 64), (False, 32), (True, 16)])
def test_rotated_keys_are_rounded_once(
    norm: bool, rotary: int, dtype: torch.dtype, device: torch.device
) -> None:
    """From the float32 of the rotation, which may differ in its last bit: so may a few of 640 roundings.
    Queries and values do not."""
    given = rope_arguments(norm, rotary, dtype, device) | {"k_scale": 0.02, "v_scale": 0.004}
    expected = given | {"kv": given["kv"].clone()}
    q, exact_q = rope_kv_write(**given), reference_rope_kv_write(**expected)
    torch.testing.assert_close(q, exact_q)
    places = given["write_blocks"], given["write_offsets"]
    stored, exact = given["kv"].float(), expected["kv"].float()
    assert torch.equal(stored[(*places, 1)], exact[(*places, 1)])
    assert int((stored[(*places, 0)] != exact[(*places, 0)]).sum()) <= 3
    torch.testing.assert_close(stored[(*places, 0)], exact[(*places, 0)], rtol=0.13, atol=2**-9)
    values = given["qkv"].unflatten(1, (8, 64))[:, 6:].float() / 0.004
    assert (stored[(*places, 1)].abs() == LARGEST).any()
    torch.testing.assert_close(stored[(*places, 1)], values.clamp(-LARGEST, LARGEST), rtol=2**-4, atol=2**-9)
    given["kv"][places] = torch.nan
    whole = torch.empty(0, dtype=EIGHT_BITS, device=device).set_(given["kv"].untyped_storage())
    assert whole.float().isnan().all()


@ROPES
def test_rotated_keys_saturate_and_keep_nan(write: Any, device: torch.device) -> None:
    given = rope_arguments(False, 64, torch.float16, device) | {"k_scale": 1e-4, "v_scale": 1e-4}
    given["qkv"][2, 4 * 64 + 3] = torch.nan
    write(**given)
    stored = given["kv"][given["write_blocks"], given["write_offsets"]].float()
    broken = stored[2, 0, 0].isnan()
    assert broken[[3, 35]].all() and broken.sum() == 2 and stored.isnan().sum() == 2
    assert stored.nan_to_num().abs().max() == LARGEST


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scales_that_cannot_be_are_named(name: str, scale: float, device: torch.device) -> None:
    given = rope_arguments(False, 64, torch.float16, device) | {name: scale}
    with pytest.raises(ValueError, match=rf"{name} is {scale}; it must be 1\.18e-38 to 8\.51e\+37"):
        rope_kv_write(**given)


def test_a_scale_is_for_8_bits(device: torch.device) -> None:
    given = rope_arguments(False, 64, torch.float16, device)
    given["kv"] = given["kv"].to(torch.float16)
    with pytest.raises(ValueError, match=r"v_scale is 2\.0; it must be 1 where kv is not float8_e4m3fn"):
        rope_kv_write(**given, v_scale=2.0)


@pytest.mark.parametrize("of_8_bits", [True, False])
def test_needs_a_gpu_that_has_8_bits(
    of_8_bits: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eight_bits, "target_architecture", lambda: 80)
    given = rope_arguments(False, 64, torch.float16, device)
    if not of_8_bits:
        rope_kv_write(**given | {"kv": given["kv"].to(torch.float16)})
        return
    with pytest.raises(ValueError, match="kv is float8_e4m3fn; it must be float16"):
        rope_kv_write(**given)
