"""The paged KV memory of one device.

Block-major: one block is one row of bytes that holds all layers, so that moving a block between
device and host is a single copy. Inside a block, per layer, tokens follow one another and each
token's keys lie next to its values, so that one gather fetches both.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch

from chiron_engine.model.spec import LayerGeometry


def _lazy_memory(size: int) -> mmap.mmap:
    """Zeroed memory that the system hands out as it is touched, in large pages where it can: with
    small ones the first write to a block takes longer than the attention over it."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _token_elements(layer: LayerGeometry) -> int:
    return 2 * layer.kv_heads * layer.head_dim


class KvPool:
    """`num_blocks` blocks of `block_size` tokens for `layers`, in `dtype`.

    storage: uint8 [num_blocks, bytes_per_block]. It starts as zeros, which the operating system
    hands out lazily, so an unused pool costs no memory on the CPU.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        layers: Sequence[LayerGeometry],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        pinned: bool = False,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV pool needs a block of a token at least, not {num_blocks} x {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = tuple(layers)
        self.dtype = dtype
        self.device = torch.device(device)
        self.bytes_per_block = self.block_bytes(block_size, self.layers, dtype)
        self.storage = self._zeros(pinned)
        self._kv = self._layer_views()

    def _zeros(self, pinned: bool) -> torch.Tensor:
        shape = (self.num_blocks, self.bytes_per_block)
        if self.device.type == "cpu" and not pinned:
            return torch.frombuffer(_lazy_memory(shape[0] * shape[1]), dtype=torch.uint8).view(shape)
        return torch.zeros(shape, dtype=torch.uint8, device=self.device, pin_memory=pinned)

    @staticmethod
    def block_bytes(block_size: int, layers: Sequence[LayerGeometry], dtype: torch.dtype) -> int:
        """Bytes of one block of `block_size` tokens over all layers, rounded up to 64 for alignment."""
        elements = block_size * sum(_token_elements(layer) for layer in layers)
        return -(-elements * dtype.itemsize // 64) * 64

    def kv(self, layer: int) -> torch.Tensor:
        """Keys and values of a layer: [num_blocks, block_size, 2, kv_heads, head_dim], a view."""
        return self._kv[layer]

    def k(self, layer: int) -> torch.Tensor:
        """Keys of a layer: [num_blocks, block_size, kv_heads, head_dim], a strided view."""
        return self._kv[layer][:, :, 0]

    def v(self, layer: int) -> torch.Tensor:
        """Values of a layer: [num_blocks, block_size, kv_heads, head_dim], a strided view."""
        return self._kv[layer][:, :, 1]

    def _layer_views(self) -> list[torch.Tensor]:
        typed = self.storage.view(self.dtype)
        views, start = [], 0
        for layer in self.layers:
            size = self.block_size * _token_elements(layer)
            part = typed[:, start : start + size]
            views.append(part.unflatten(1, (self.block_size, 2, layer.kv_heads, layer.head_dim)))
            start += size
        return views
