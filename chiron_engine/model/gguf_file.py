"""A GGUF file: its metadata, checked as it is read, and its tensors. Every refusal names the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from chiron_engine.model.errors import ModelError

_MAGIC = (b"GGUF", b"FUGG")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)
# What the reader raises, by where a damaged file is cut or what its counts claim.
_UNREADABLE = (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError)


class _Reader(gguf.GGUFReader):
    """Stops at the file's end, where the library goes on with empty values for as long as a damaged
    count says."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) < count:
            raise ValueError(f"it ends before its byte {offset} is reached")
        return values


class GgufFile:
    """Raises ModelError for a file that is not GGUF, is damaged, or is one part of several."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        _refuse_other(path)
        try:
            reader = _Reader(str(path))
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
        except _UNREADABLE as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"cannot read {path}: {cause}; download it again") from None
        self.tensors: dict[str, gguf.ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        if self.integer("split.count", 0) > 1:
            raise _split(path)

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.name}: {what}")

    def keys_under(self, prefix: str) -> list[str]:
        """The metadata keys that begin with `prefix` and say something: not 0, false or empty."""
        return [key for key, value in self._fields.items() if key.startswith(prefix) and value]

    def value(self, key: str) -> Any:
        """The value as it is, None where there is none."""
        return self._fields.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(f"{key} must be an integer, not {_shown(value)}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """An integer that is at least 1."""
        value = self.integer(key, default)
        if value < 1:
            raise self.fail(f"{key} must be positive, not {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Numbers are float32 in the file: the shortest decimal that gives the same float32."""
        value = self._fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise self.fail(f"{key} must be a number, not {_shown(value)}")
        return float(str(np.float32(value)))

    def flag(self, key: str, default: bool) -> bool:
        value = self._fields.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(f"{key} must be true or false, not {_shown(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._fields.get(key, default)
        if not isinstance(value, str):
            raise self.fail(f"{key} must be a text, not {_shown(value)}")
        return value

    def array(self, key: str, kind: type | tuple[type, ...], length: int | None = None) -> list[Any]:
        """An array of `kind`, of `length` elements where that is given."""
        value = self._fields.get(key)
        if not isinstance(value, list) or not all(isinstance(element, kind) for element in value):
            raise self.fail(f"{key} must be an array of its kind, not {_shown(value)}")
        if length is not None and len(value) != length:
            raise self.fail(f"{key} has {len(value)} elements, not {length}")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows first (the file has the row's length first)."""
        if name not in self.tensors:
            raise self.fail(f"lacks the tensor {name}; download a complete file")
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def weights(self, name: str) -> np.ndarray:
        """A tensor as float32, whatever it is packed as, in its shape."""
        tensor = self.tensors[name]
        values = np.asarray(self._unpacked(tensor, tensor.data), dtype=np.float32)
        return values.reshape(self.shape(name))

    def check_packing(self) -> None:
        """Raises ModelError where a tensor's type is one that cannot be unpacked. Unpacks one row of
        each type, so that this shows before minutes of work."""
        firsts = {tensor.tensor_type: tensor for tensor in self.tensors.values()}
        for tensor in firsts.values():
            self._unpacked(tensor, tensor.data[:1])

    def _unpacked(self, tensor: gguf.ReaderTensor, data: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(gguf.dequantize(data, tensor.tensor_type))
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise self.fail(f"{tensor.name} is packed as {kind}, which is not supported") from None


def _refuse_other(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    if magic not in _MAGIC:
        raise ModelError(f"{path} is not a GGUF file: it begins with {magic!r}, not {_MAGIC[0]!r}")
    if _PART.search(path.name):
        raise _split(path)


def _split(path: Path) -> ModelError:
    return ModelError(
        f"{path} is one part of a split model; make one file of the parts: "
        "llama-gguf-split --merge FIRST-PART MODEL.gguf"
    )


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
