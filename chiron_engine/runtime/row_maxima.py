"""The largest values of rows as long as a vocabulary.

torch finds the largest value of a row quickly on the CPU, but where it stands, or the largest few, ten times
slower. So rows are looked through in blocks: the largest values lie in the blocks with the largest maxima.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_BLOCK = 256
LEAST_BLOCK = 32


def largest(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row and the first place that has it, as `rows.max(dim=-1)`."""
    size = _block_size(rows)
    if not size:
        return rows.max(dim=-1)
    blocks = rows.view(len(rows), -1, size)
    maxima = blocks.amax(dim=-1)
    block = maxima.argmax(dim=-1)
    inside = blocks[torch.arange(len(rows), device=rows.device), block]
    return maxima.gather(1, block.unsqueeze(1)).squeeze(1), block * size + inside.argmax(dim=-1)


def largest_few(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of each row, the largest first, and their places, as `rows.topk(count)`;
    of equal ones at the end others may be chosen."""
    size = _block_size(rows)
    if not size or count * size * 2 > rows.shape[1]:
        values, places = rows.topk(count, dim=-1)
        return values, places
    blocks = rows.view(len(rows), -1, size)
    best = blocks.amax(dim=-1).topk(count, dim=-1).indices
    inside = blocks.gather(1, best.unsqueeze(2).expand(-1, -1, size)).flatten(1)
    values, found = inside.topk(count, dim=-1)
    return values, best.gather(1, found // size) * size + found % size


def _block_size(rows: Tensor) -> int:
    """0 where there are no blocks to gain from."""
    size = math.gcd(rows.shape[1], MOST_BLOCK)
    return size if rows.device.type == "cpu" and size >= LEAST_BLOCK and rows.is_contiguous() else 0
