"""Tests of 8-bit floats, which not every GPU has. The interpreter has them."""

from __future__ import annotations

import pytest
import torch

needs_8_bits = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU of compute capability 8.9 or more",
)
