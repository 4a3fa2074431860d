"""Arrays of the host on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def upload_array(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device. On CUDA it goes through pinned memory, so the host does not wait; the
    allocator keeps the pinned memory until the copy is made."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return host.clone()
    if not array.size:
        return torch.empty(array.shape, dtype=host.dtype, device=device)
    return host.pin_memory().to(device, non_blocking=True)
