"""Other implementations of paged attention, to be timed beside ours on the same data.

A peer is a module with NAME, PACKAGE, which it needs, and `prepare(inputs)`: a call for each layer that
returns [T, Hq, D] as ours does. It raises `Unsupported` for what it has no kernel for. None is needed: one
that is not installed is named in the results.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from benchmarks.attention_inputs import AttentionInputs

Calls = Sequence[Callable[[], torch.Tensor]]


class Unsupported(Exception):
    """Says what a peer has no kernel for."""


class Peer(Protocol):
    NAME: str
    PACKAGE: str

    def prepare(self, inputs: AttentionInputs) -> Calls: ...


def all_peers() -> list[Peer]:
    from benchmarks.peers import cudnn_sdpa, flash_attention, flashinfer_paged, torch_sdpa

    return [flashinfer_paged, cudnn_sdpa, flash_attention, torch_sdpa]


def is_installed(peer: Peer) -> bool:
    try:
        return importlib.util.find_spec(peer.PACKAGE) is not None
    except ModuleNotFoundError:  # of a package that PACKAGE lies in
        return False
