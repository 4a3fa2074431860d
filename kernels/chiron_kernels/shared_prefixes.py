"""Which requests of a decode step begin with the same blocks, as `cascade_attention` is told."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefixes:
    """G groups of R of the B decoding requests, of which none is in two.

    Those of a group have the same blocks up to the end of the group's prefix, which is whole blocks, one at
    least. Each has a key or more after it, so that what is left of a request is never empty: its newest token
    is in a block of its own, as blocks are shared once they are full.

    members: int64 [R], numbers of requests, group after group. starts: int64 [G + 1], group g has
    members[starts[g]] .. members[starts[g + 1] - 1]. table_rows: int64 [G], a row of the block tables that
    begins with the prefix. lens: int64 [G], keys of the prefix. skipped: int64 [B], keys of each request's
    prefix, 0 where it has none. longest: of lens. everyone: members is 0 .. B - 1, in this order.
    """

    members: torch.Tensor
    starts: torch.Tensor
    table_rows: torch.Tensor
    lens: torch.Tensor
    skipped: torch.Tensor
    longest: int
    everyone: bool
