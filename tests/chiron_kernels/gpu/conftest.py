"""The Triton kernels: on the GPU where there is one, else by the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.triton_interpreter import install

if not torch.cuda.is_available():
    install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
