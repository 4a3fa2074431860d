"""What launches ask and compute before Triton has them."""

from __future__ import annotations

import pytest
import torch
from chiron_kernels.gpu import launch
from chiron_kernels.gpu.checks import check_shape
from chiron_kernels.gpu.launch import HOPPER, power_of_two_from, target_architecture
from triton.backends.compiler import GPUTarget


class Gpus:
    """A driver of several GPUs that counts what it is asked."""

    def __init__(self, *architectures: int) -> None:
        self.current, self.asked = 0, 0
        self._architectures = architectures

    def get_current_device(self) -> int:
        return self.current

    def get_current_target(self) -> GPUTarget:
        self.asked += 1
        return GPUTarget("cuda", self._architectures[self.current], 32)


def test_each_device_is_asked_once_for_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(80, 100)
    monkeypatch.setattr(launch.driver, "_active", gpus)
    monkeypatch.setattr(launch.triton.knobs.runtime, "interpret", False)
    assert [target_architecture() for _ in range(3)] == [80, 80, 80]
    gpus.current = 1
    assert [target_architecture() for _ in range(3)] == [100, 100, 100]
    assert gpus.asked == 2
    monkeypatch.setattr(launch.driver, "_active", Gpus(89))
    assert target_architecture() == 89
    monkeypatch.setattr(launch.triton.knobs.runtime, "interpret", True)
    assert target_architecture() == HOPPER


def test_powers_of_two() -> None:
    assert [power_of_two_from(size) for size in (1, 2, 3, 4, 5, 127, 128, 129)] == [
        1, 2, 4, 4, 8, 128, 128, 256,
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 3), (None, 3), (2, None), (None, None)])
def test_shapes_that_fit(shape: tuple[int | None, ...]) -> None:
    check_shape("x", torch.empty(2, 3), shape)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((3, 2), r"\[3, 2\]"), ((2,), r"\[2\]"), ((None,), r"\[any\]"), ((None, 4), r"\[any, 4\]")],
)
def test_shapes_that_do_not_fit_are_named(shape: tuple[int | None, ...], wanted: str) -> None:
    with pytest.raises(ValueError, match=rf"x is \[2, 3\]; it must be {wanted}"):
        check_shape("x", torch.empty(2, 3), shape)
