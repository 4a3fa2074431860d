"""Where a launch is queued."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from chiron_kernels.gpu import launch
from chiron_kernels.gpu.launch import Launch
from torch._subclasses import FakeTensorMode


class NotedKernel:
    """Notes the GPU that is current as it is launched."""

    def __init__(self, current: list[int]) -> None:
        self.current, self.launched_on = current, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.launched_on.append(self.current[-1])


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two pretended GPUs. The last entry is the current one."""
    stack = [0]

    class Guard(AbstractContextManager[None]):
        def __init__(self, gpu: int) -> None:
            self._gpu = gpu

        def __enter__(self) -> None:
            stack.append(self._gpu)

        def __exit__(self, *error: object) -> None:
            stack.pop()

    monkeypatch.setattr(launch, "_several_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: stack[-1])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    return stack


@pytest.mark.parametrize("gpu", [0, 1])
def test_a_kernel_is_queued_where_its_arguments_are(gpu: int, current: list[int]) -> None:
    """Though the first argument is in the host's memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(4, device=f"cuda:{gpu}")
    kernel = NotedKernel(current)
    Launch(kernel, (1,), {"host": torch.empty(4), "number": 3, "there": there}).run()
    assert kernel.launched_on == [gpu] and current == [0]


def test_arguments_without_a_gpu_need_none(current: list[int]) -> None:
    kernel = NotedKernel(current)
    Launch(kernel, (1,), {"host": torch.empty(4)}).run()
    Launch(kernel, (1, 0), {"host": torch.empty(4)}).run()
    assert kernel.launched_on == [0]


def test_with_one_gpu_arguments_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_several_gpus", lambda: False)
    monkeypatch.setattr(Launch, "_gpu", None)
    kernel = NotedKernel([0])
    Launch(kernel, (1,), {"host": torch.empty(4)}).run()
    assert kernel.launched_on == [0]
