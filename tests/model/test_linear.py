"""The packed linear layer equals the plain one, for every number of rows and with either layout."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from chiron_engine.model import linear as module
from chiron_engine.model.linear import Linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, 255, 256, 600])
def test_equals_the_plain_product(
    rows: int, dtype: torch.dtype, packed: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed and not module.can_pack(torch.zeros(1, 1, dtype=dtype)):
        pytest.skip("oneDNN packs no weights of this type here")
    if not packed:
        monkeypatch.setattr(module, "can_pack", lambda weight: False)
    torch.manual_seed(0)
    weight = torch.randn(48, 40, dtype=dtype)
    shift = torch.randn(48, dtype=dtype) if bias else None
    x = torch.randn(rows, 40, dtype=dtype)
    out = Linear(weight.clone(), shift)(x)
    expected = linear(x.float(), weight.float(), None if shift is None else shift.float())
    assert out.dtype == dtype and out.shape == (rows, 48)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


def test_the_input_need_not_be_contiguous() -> None:
    weight, x = torch.randn(8, 6), torch.randn(5, 12)[:, 3:9]
    torch.testing.assert_close(Linear(weight)(x), linear(x, weight))
