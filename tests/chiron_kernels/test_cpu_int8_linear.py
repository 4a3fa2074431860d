"""The 8-bit linear layer against the same rounding written out in torch."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from chiron_kernels.cpu.int8_linear import COLUMNS, GROUP, TURNED, int8_linear, pack_int8
from torch.nn.functional import pad, silu

LARGEST = 127


def hadamard(size: int) -> torch.Tensor:
    """Entries of 1 and -1, rows orthogonal; the sign is the parity of the bits that both numbers have."""
    if size == 1:
        return torch.ones(1, 1)
    half = hadamard(size // 2)
    return torch.cat((torch.cat((half, half), 1), torch.cat((half, -half), 1)))


def turned(x: torch.Tensor) -> torch.Tensor:
    """[N, K], K filled up to a multiple of 64, times a Hadamard matrix for each 64."""
    x = pad(x, (0, -x.shape[1] % TURNED))
    return (x.unflatten(1, (-1, TURNED)).double() @ hadamard(TURNED).double()).flatten(1)


def in_steps(x: torch.Tensor) -> torch.Tensor:
    """Values [N, any] rounded to a 127th of the row's largest."""
    step = x.abs().amax(dim=-1, keepdim=True) / LARGEST
    return torch.round(x / step.where(step > 0, 1.0)) * step


def by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of both sides turned and rounded, float64."""
    activations = torch.cat([in_steps(part) for part in turned(x).split(GROUP, dim=1)], dim=1)
    out = activations @ in_steps(turned(weight)).T / TURNED
    return out if bias is None else out + bias.double()


def test_turning_both_sides_leaves_the_product_as_it_is() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 192).double(), torch.randn(5, 192).double()
    assert torch.allclose(turned(x) @ turned(weight).T / TURNED, x @ weight.T)


@pytest.mark.parametrize("shape", [(64, 320), (70, 100)], ids=str)
def test_weights_are_rounded_and_laid_out(vnni_library: ctypes.CDLL, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-30, 30, shape[0])[:, None]
    weight[3] = 0.0
    packed = pack_int8(vnni_library, weight)
    wanted = pad(turned(weight), (0, 0, 0, -shape[0] % COLUMNS))
    scales = wanted.abs().amax(dim=1) / LARGEST
    assert torch.allclose(packed.scales.double(), scales / TURNED, rtol=1e-6, atol=0)
    in_order = packed.values.transpose(1, 2).reshape(wanted.shape).double() - 128
    assert in_order.abs().amax(dim=1).eq(scales.sign() * LARGEST).all()
    # A value just between two steps may be rounded either way.
    assert (in_order * scales[:, None] - wanted).abs().le(0.50001 * scales[:, None]).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(576, 960), (64, 32), (100, 70), (1536, 576), (448, 33)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 64])
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
    assert (out - wanted).norm() < 5e-4 * wanted.norm()


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
    weight, x = torch.randn(32, 2 * GROUP), torch.randn(1, 2 * GROUP)
    x[0, 5] = 1e4
    weight[:, :GROUP] = 0.0
    out = int8_linear(vnni_library, x, pack_int8(vnni_library, weight))
    wanted = x[:, GROUP:] @ weight[:, GROUP:].T
    assert (out - wanted).norm() < 0.02 * wanted.norm()


def test_a_large_input_is_spread_over_its_neighbours(vnni_library: ctypes.CDLL) -> None:
    """Rounded as it is, in the same groups, it takes three times as much precision from the others."""
    torch.manual_seed(0)
    weight, x = torch.randn(256, GROUP), torch.randn(64, GROUP)
    x[:, 5] = 40.0
    weight[:, 5] = 0.0
    wanted = x @ weight.T
    out = int8_linear(vnni_library, x, pack_int8(vnni_library, weight))
    as_it_is = in_steps(x) @ in_steps(weight).T
    assert (out - wanted).norm() < 0.33 * (as_it_is - wanted).norm()


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


@pytest.mark.parametrize(
    "x",
    [torch.ones(3, 128), torch.ones(3, 70).double(), torch.ones(70, 3).T, torch.ones(70), torch.ones(3, 71)],
)
def test_an_input_that_does_not_fit_is_refused(vnni_library: ctypes.CDLL, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"it must be float32 \[rows, 70\], contiguous"):
        int8_linear(vnni_library, x, pack_int8(vnni_library, torch.ones(32, 70)))


def test_gates_without_as_many_others_are_refused(vnni_library: ctypes.CDLL) -> None:
    with pytest.raises(ValueError, match="a gated weight has 5 rows"):
        pack_int8(vnni_library, torch.ones(5, 64), gated=True)
