"""The compiled elementwise operations against torch."""

from __future__ import annotations

import ctypes

import pytest
import torch
from chiron_kernels.cpu.decoder_ops import add_rms_norm, rotate, silu_multiply
from torch.nn.functional import rms_norm, silu


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", [(1, 576), (5, 100), (300, 64), (3, 7)], ids=str)
def test_norm(library: ctypes.CDLL, shape: tuple[int, int], added: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape) * 30, torch.randn(shape[1])
    delta = torch.randn(shape) if added else None
    total = x.clone() if delta is None else x + delta
    out = add_rms_norm(library, x, delta, weight, 1e-5)
    assert torch.equal(x, total)
    assert torch.allclose(out, rms_norm(total, weight.shape, weight, 1e-5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1536), (7, 20), (40, 512)], ids=str)
def test_gated_silu(library: ctypes.CDLL, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(shape[0], 2 * shape[1]) * 20
    gate_up[0, :4] = torch.tensor([-1e30, 1e30, -200.0, 0.0])
    gate, up = gate_up.chunk(2, dim=1)
    assert torch.allclose(silu_multiply(library, gate_up), silu(gate) * up, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [64, 20, 128])
@pytest.mark.parametrize("rows", [1, 50])
def test_rotation(library: ctypes.CDLL, rows: int, size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 15, size)
    cosines, sines = torch.randn(rows, 1, size), torch.randn(rows, 1, size)
    wanted = x[:, :12] * cosines + x[:, :12].roll(size // 2, -1) * sines
    kept = x[:, 12:].clone()
    rotate(library, x, 12, cosines, sines)
    assert torch.allclose(x[:, :12], wanted, atol=1e-6) and torch.equal(x[:, 12:], kept)
