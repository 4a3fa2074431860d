"""Which kernels run where."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from chiron_engine.model import cpu_kernels, kernel_choice
from chiron_engine.model.kernel_choice import Kernels, best_kernels, named_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_is_the_quickest_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_kernels(CUDA) is Kernels.TRITON
    assert named_kernels("auto", CPU) is best_kernels(CPU)
    monkeypatch.setattr(cpu_kernels, "open_kernels", lambda: "no compiler")
    assert best_kernels(CPU) is Kernels.TORCH
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert best_kernels(CUDA) is Kernels.TORCH


def test_torch_runs_anywhere() -> None:
    assert named_kernels("torch", CPU) is named_kernels("torch", CUDA) is Kernels.TORCH


def test_what_cannot_run_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kernels is 'cuda'; it must be one of auto, compiled"):
        named_kernels("cuda", CPU)
    with pytest.raises(ValueError, match="kernels is 'compiled', which cannot run on cuda:0: they are for"):
        named_kernels("compiled", CUDA)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cannot run on cpu: they need a GPU"):
        named_kernels("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert named_kernels("triton", CPU) is Kernels.TRITON
    monkeypatch.setattr(kernel_choice, "open_kernels", lambda: "no compiler")
    with pytest.raises(ValueError, match="cannot run on cpu: no compiler"):
        named_kernels("compiled", CPU)
