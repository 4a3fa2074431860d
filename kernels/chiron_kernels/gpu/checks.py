"""Arguments are checked before a launch: a kernel that is given the wrong ones reads what is not its own.

All raise ValueError, which names the argument, what it was and what would be right.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """None stands for any size."""
    # A step checks a thousand shapes: most are known whole, and compared at once.
    found = tensor.shape
    if found == shape or (None in shape and _fits(found, shape)):
        return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(f"{name} is {list(found)}; it must be [{wanted}]")


def _fits(found: torch.Size, shape: tuple[int | None, ...]) -> bool:
    return len(found) == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(found, shape, strict=True)
    )


def check_dtype(name: str, tensor: torch.Tensor, allowed: Collection[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {names}")


def check_device(like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """All where `like` is."""
    device = like.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {device}")


def check_last_dense(name: str, tensor: torch.Tensor) -> None:
    """Neighbours of the last dimension lie next to each other: loads of 16 bytes need that."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be 1")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}; it must be contiguous")


def check_vectors(like: torch.Tensor, count: int, **tensors: tuple[torch.Tensor, torch.dtype]) -> None:
    """Each with its dtype, contiguous, [count], and where `like` is."""
    for name, (tensor, dtype) in tensors.items():
        check_shape(name, tensor, (count,))
        check_dtype(name, tensor, (dtype,))
        check_contiguous(name, tensor)
        check_device(like, **{name: tensor})
