"""The activation of a gated feed-forward layer."""

from __future__ import annotations

import math

import pytest
import torch
from chiron_kernels.gpu.activation import KINDS, Activation, gated_activation
from chiron_kernels.reference.activation import gated_activation as reference_gated_activation

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""float32: about -5, 1 + erf(x) leaves few digits, times another factor of up to 10."""
FAR = (-1e4, -100.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 100.0, 1e4)
"""Where an exponential would leave float32, and about 0."""


def exact(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """In float64, by the definitions."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    if kind == "silu":
        return gate / (1 + (-gate).exp()) * up
    if kind == "gelu":
        return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return gate * 0.5 * (1 + inner.tanh()) * up


def random_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * width)
    gate_up = 3 * torch.randn(rows, 2 * width, generator=generator)
    known = min(width, len(FAR))
    gate_up[:, :known] = torch.tensor(FAR)[:known]
    gate_up[:, width : width + known] = 1.0
    return gate_up.to(device, dtype)


# An exponential that leaves float32 is infinite, as on a GPU, and its sigmoid 0.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 64), (3, 1023), (2, 1537), (1, 2048)])
@pytest.mark.parametrize("activation", [gated_activation, reference_gated_activation])
def test_equals_float64(
    rows: int, width: int, kind: Activation, dtype: torch.dtype, activation, device: torch.device
) -> None:
    gate_up = random_rows(rows, width, dtype, device)
    before = gate_up.clone()
    found = activation(gate_up, kind)
    assert torch.equal(gate_up, before)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), exact(gate_up, kind), rtol=bound, atol=bound)


def test_no_rows(device: torch.device) -> None:
    assert gated_activation(torch.empty(0, 64, device=device), "silu").shape == (0, 32)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (lambda x: x[0], "silu", r"gate_up is \[64\]; it must be \[any, any\]"),
        (lambda x: x.double(), "silu", "gate_up is float64"),
        (lambda x: x[:, :63].contiguous(), "silu", "gate_up has rows of 63"),
        (lambda x: x[:, :0].contiguous(), "silu", "gate_up has rows of 0"),
        (lambda x: x[:, :32], "silu", "gate_up has strides"),
        (lambda x: x, "relu", "kind is 'relu'; it must be silu, gelu, gelu_tanh"),
    ],
)
def test_bad_arguments_are_named(change, kind, says: str, device: torch.device) -> None:
    gate_up = random_rows(2, 32, torch.float16, device)
    with pytest.raises(ValueError, match=says):
        gated_activation(change(gate_up), kind)
