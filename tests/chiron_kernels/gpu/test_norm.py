"""Residual addition and norm in one kernel."""

from __future__ import annotations

import pytest
import torch
from chiron_kernels.gpu.norm import WIDEST, add_rms_norm
from chiron_kernels.reference.norm import add_rms_norm as reference_add_rms_norm

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def tensors(
    rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * width)
    x, delta = (torch.randn(rows, width, generator=generator).to(device, dtype) for _ in range(2))
    weight = torch.randn(width, generator=generator).to(device, dtype)
    return x, delta, weight


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 64), (35, 64), (5, 256), (3, 576), (5, 1), (2, 4097), (1, WIDEST)]
)
@pytest.mark.parametrize("adds", [False, True])
def test_equals_the_reference(
    rows: int, width: int, dtype: torch.dtype, adds: bool, device: torch.device
) -> None:
    x, delta, weight = tensors(rows, width, dtype, device)
    before = x.clone()
    total, normed = add_rms_norm(x, delta if adds else None, weight, EPS)
    assert torch.equal(x, before)
    expected_total, _ = reference_add_rms_norm(x, delta if adds else None, weight, EPS)
    assert torch.equal(total, expected_total)
    wide = total.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    torch.testing.assert_close(normed.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_no_rows(device: torch.device) -> None:
    x, delta, weight = tensors(0, 64, torch.float16, device)
    total, normed = add_rms_norm(x, delta, weight, EPS)
    assert total.shape == normed.shape == (0, 64)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("x", lambda x: x.double(), "x is float64; it must be float16, bfloat16, float32"),
        ("x", lambda x: x[0], r"x is \[64\]; it must be \[any, any\]"),
        ("x", lambda x: x.T.contiguous().T, "x has strides"),
        ("x", lambda x: x.new_empty(4, WIDEST + 1), "x has rows of 16385"),
        ("delta", lambda x: x[:3], r"delta is \[3, 64\]; it must be \[4, 64\]"),
        ("delta", lambda x: x.float(), "delta is float32; it must be float16"),
        ("weight", lambda x: x[:32], r"weight is \[32\]; it must be \[64\]"),
        ("weight", lambda x: x.to("meta"), "weight is on meta"),
    ],
)
def test_bad_arguments_are_named(name: str, change, says: str, device: torch.device) -> None:
    x, delta, weight = tensors(4, 64, torch.float16, device)
    arguments = {"x": x, "delta": delta, "weight": weight}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=says):
        add_rms_norm(**arguments, eps=EPS)
