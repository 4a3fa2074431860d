"""Blocks of the KV pools, copied between scattered rows."""

from __future__ import annotations

import torch


def copy_blocks(
    source: torch.Tensor, source_rows: torch.Tensor, target: torch.Tensor, target_rows: torch.Tensor
) -> None:
    """target[target_rows[i]] = source[source_rows[i]]: uint8 [blocks, bytes], rows int64 [count]."""
    target[target_rows] = source[source_rows]


def gather_blocks(source: torch.Tensor, source_rows: torch.Tensor, buffer: torch.Tensor) -> None:
    """buffer[i] = source[source_rows[i]]."""
    buffer[: source_rows.shape[0]] = source[source_rows]


def scatter_blocks(buffer: torch.Tensor, target: torch.Tensor, target_rows: torch.Tensor) -> None:
    """target[target_rows[i]] = buffer[i]."""
    target[target_rows] = buffer[: target_rows.shape[0]]
