"""Where the Triton kernels run."""

from __future__ import annotations

import torch


def runs_triton(device: torch.device) -> bool:
    """Whether tensors of this device are the Triton kernels' to work on. Modules of these are imported only
    then: importing Triton takes a while."""
    return device.type == "cuda"
