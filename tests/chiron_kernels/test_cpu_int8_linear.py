"""The 8-bit linear layer against the same rounding written out in torch."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from chiron_kernels.cpu.int8_linear import COLUMNS, GROUP, int8_linear, pack_int8
from torch.nn.functional import pad, silu

LARGEST = 127


def by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of both sides rounded in groups, float64."""
    x, weight = (pad(side, (0, -x.shape[1] % GROUP)) for side in (x, weight))
    values, scales = round_weight(weight)
    rounded = (values.unflatten(1, (-1, GROUP)).double() * scales[..., None].double()).flatten(1)
    groups = x.unflatten(1, (-1, GROUP))
    step = groups.abs().amax(dim=-1, keepdim=True) / LARGEST
    out = (torch.round(groups / step.where(step > 0, 1.0)).double() * step.double()).flatten(1) @ rounded.T
    return out if bias is None else out + bias.double()


def round_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K], K a multiple of 32, as whole numbers in [-127, 127] (float [N, K]) and scales
    bfloat16 [N, K / 32]."""
    groups = weight.unflatten(1, (-1, GROUP))
    # Rounded up, so that the largest still fits: the next bfloat16 is larger by 2^-7 at most.
    scales = (groups.abs().amax(dim=-1) / LARGEST * (1 + 2**-7)).bfloat16()
    steps = torch.where(scales >= torch.finfo(torch.bfloat16).smallest_normal, 1 / scales.float(), 0.0)
    return torch.round(groups * steps[..., None]).clamp_(-LARGEST, LARGEST).flatten(1), scales


@pytest.mark.parametrize("shape", [(64, 320), (70, 100)], ids=str)
def test_weights_are_rounded_and_laid_out(vnni_library: ctypes.CDLL, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-37, 37, shape[0])[:, None]
    weight[3] = 0.0
    packed = pack_int8(vnni_library, weight)
    values, scales = round_weight(pad(weight, (0, -shape[1] % GROUP, 0, -shape[0] % COLUMNS)))
    blocks = values.shape[0] // COLUMNS
    laid_out = values.view(blocks, COLUMNS, -1, 4).transpose(1, 2) + 128
    assert torch.equal(packed.values, laid_out.to(torch.uint8))
    assert torch.equal(packed.scales, scales.view(blocks, COLUMNS, -1).transpose(1, 2))


def test_a_rounded_weight_is_close_and_fits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 320) * torch.logspace(-20, 20, 64)[:, None]
    values, scales = round_weight(weight)
    assert LARGEST - 2 <= values.abs().max() <= LARGEST and torch.equal(values, values.round())
    back = (values.unflatten(1, (-1, GROUP)) * scales[..., None].float()).flatten(1)
    assert ((back - weight).abs() <= 0.51 * scales.float().repeat_interleave(GROUP, dim=1)).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(576, 960), (64, 32), (100, 70), (1536, 576)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13, 64])
def test_equals_the_rounded_product(
    vnni_library: ctypes.CDLL, rows: int, shape: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(rows)
    inputs, outputs = shape
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    added = torch.randn(outputs) if bias else None
    out = int8_linear(vnni_library, x, pack_int8(vnni_library, weight, added))
    assert out.shape == (rows, outputs) and out.is_contiguous()
    wanted = by_hand(x, weight, added)
    # A value just between two steps may be rounded either way: a half of a step of one input.
    assert (out - wanted).abs().max() < 2e-3 * wanted.abs().max()
    assert (out - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("middle", [1536, 70, 16])
@pytest.mark.parametrize("rows", [1, 9])
def test_gates_are_applied_to_their_outputs(vnni_library: ctypes.CDLL, rows: int, middle: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, 96), torch.randn(2 * middle, 96), torch.randn(2 * middle)
    gate, up = by_hand(x, weight, bias).chunk(2, dim=1)
    out = int8_linear(vnni_library, x, pack_int8(vnni_library, weight, bias, gated=True))
    assert out.shape == (rows, middle)
    wanted = silu(gate) * up
    assert (out - wanted).abs().max() < 2e-3 * wanted.abs().max()


def test_the_largest_sums_do_not_saturate(vnni_library: ctypes.CDLL) -> None:
    weight = torch.full((32, 4096), 3.0)
    weight[1] = -3.0
    out = int8_linear(vnni_library, torch.full((1, 4096), -2.0), pack_int8(vnni_library, weight))
    # Sums of pairs that saturate at 16 bits would be off by a half.
    assert torch.allclose(out[0, :2], torch.tensor([-6.0, 6.0]) * 4096, rtol=1e-2)


def test_a_row_gets_the_same_bits_whatever_stands_beside_it(vnni_library: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    weight = pack_int8(vnni_library, torch.randn(96, 576), torch.randn(96))
    x = torch.randn(64, 576) * torch.logspace(-3, 3, 64)[:, None]
    together = int8_linear(vnni_library, x, weight)
    for row in range(64):
        assert torch.equal(int8_linear(vnni_library, x[row : row + 1], weight)[0], together[row])


def test_one_large_input_spoils_its_group_only(vnni_library: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 128), torch.randn(1, 128)
    x[0, 5] = 1e4
    weight[:, :GROUP] = 0.0
    out = int8_linear(vnni_library, x, pack_int8(vnni_library, weight))
    wanted = x[:, GROUP:] @ weight[:, GROUP:].T
    assert (out - wanted).norm() < 0.02 * wanted.norm()


def test_zeros_and_no_rows(vnni_library: ctypes.CDLL) -> None:
    weight = pack_int8(vnni_library, torch.zeros(33, 65))
    assert torch.equal(int8_linear(vnni_library, torch.zeros(2, 65), weight), torch.zeros(2, 33))
    assert int8_linear(vnni_library, torch.zeros(0, 65), weight).shape == (0, 33)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(vnni_library: ctypes.CDLL, broken: float) -> None:
    weight = torch.randn(4, 70)
    weight[2, 69] = broken
    with pytest.raises(ValueError, match=r"shape \[4, 70\] holds values that are not finite"):
        pack_int8(vnni_library, weight)


def test_an_input_that_is_not_finite_does_not_become_a_number(vnni_library: ctypes.CDLL) -> None:
    x = torch.randn(3, 64)
    x[1, 7] = math.nan
    x[2, 9] = math.inf
    out = int8_linear(vnni_library, x, pack_int8(vnni_library, torch.randn(32, 64)))
    assert out[0].isfinite().all() and not out[1].isfinite().any() and not out[2].isfinite().any()
