"""The tensors of a model directory, read from safetensors one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from chiron_engine.model.directory import weight_files
from chiron_engine.model.errors import ModelError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Checkpoint:
    """Reads tensors by name. Raises ModelError where a file is broken, or a tensor is missing, of
    another shape than asked for, or not of a floating-point type."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._file_of: dict[str, tuple[Path, Any]] = {}
        for file in weight_files(path):
            opened = _open(file)
            self._file_of.update(dict.fromkeys(opened.keys(), (file, opened)))
        self._path = path
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> Iterable[str]:
        """Of all tensors there are."""
        return self._file_of.keys()

    def read_number(self, name: str) -> float:
        """Of a tensor that holds one."""
        file, opened = self._opened(name)
        shape = opened.get_slice(name).get_shape()
        if math.prod(shape) != 1:
            raise ModelError(f"{file}: {name} has shape {list(shape)}; it must be one number")
        return float(self._checked(name, shape, file, opened))

    def read(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The tensor in the dtype and on the device asked for. Where no conversion is needed it is
        a view of the file, whose pages stay in memory as long as any view does: never write to it, and
        keep none (see `read_copy` and `map`)."""
        tensor = self._checked(name, shape, *self._opened(name))
        return tensor.to(device=self._device, dtype=self._dtype)

    def read_copy(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Like `read`, but never a view: for the small tensors that a model keeps."""
        return self.read(name, shape).clone()

    def map(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Like `read`, but on the CPU a view of a mapping of its own, in the file's dtype: of a large table
        only what is looked up in it takes memory."""
        file, _ = self._opened(name)
        tensor = self._checked(name, shape, file, _open(file))
        return tensor if self._device.type == "cpu" else tensor.to(device=self._device, dtype=self._dtype)

    def _opened(self, name: str) -> tuple[Path, Any]:
        if name not in self._file_of:
            raise ModelError(f"{self._path} lacks the tensor {name}: not a complete checkpoint of this model")
        return self._file_of[name]

    def _checked(self, name: str, shape: Sequence[int], file: Path, opened: Any) -> torch.Tensor:
        self._read.add(name)
        found = tuple(opened.get_slice(name).get_shape())
        if found != tuple(shape):
            raise ModelError(
                f"{file}: {name} has shape {list(found)}, but config.json asks for {list(shape)}"
            )
        try:
            tensor = opened.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"cannot read {name} of {file}: {error}") from None
        if tensor.dtype not in _FLOATS:
            raise ModelError(f"{file}: {name} is {tensor.dtype}: quantised checkpoints are not supported")
        return tensor

    def check_all_read(self, ignored: Callable[[str], bool]) -> None:
        """Raises ModelError where tensors are left over that `ignored` does not excuse: the config
        describes another model than the weights."""
        left = sorted(name for name in self._file_of if name not in self._read and not ignored(name))
        if left:
            raise ModelError(
                f"{self._path} has {len(left)} tensors its config.json does not account for, "
                f"{left[0]} among them"
            )

    def stack(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> torch.Tensor:
        """Several tensors concatenated along the first axis, without a second copy of any."""
        rows = sum(shape[0] for shape in shapes)
        out = torch.empty((rows, *shapes[0][1:]), dtype=self._dtype, device=self._device)
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            out[start : start + shape[0]] = self.read(name, shape)
            start += shape[0]
        return out


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {file}: {error}; download the model again") from None
