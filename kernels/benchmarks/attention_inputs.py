"""Random queries over a paged pool of random keys and values, and what attention over these must give.

The pool is the engine's: a block holds all layers, so a layer's blocks lie far apart, and blocks of a request
are anywhere. Calls go from layer to layer as a step of the engine does, so that none finds its keys in the
cache.

    block 0 | layer 0 | layer 1 | ... |    block 1 | layer 0 | layer 1 | ... |    ...
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHECKED_ROWS = 4
"""Of a request, the last ones: their errors are computed, in float32."""


@dataclass(frozen=True, slots=True)
class Request:
    """tokens: queries, the last of its keys. context: keys before these."""

    tokens: int
    context: int

    @property
    def keys(self) -> int:
        return self.context + self.tokens


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInputs:
    """q: [T, Hq, D], the requests' rows one after another. layers: of [num_blocks, block_size, 2, Hkv, D].
    tables: int64 [B, W] block ids, unused columns 0. window: keys a row sees, itself included, None for all.
    Scales of 8-bit keys and values are 1."""

    requests: tuple[Request, ...]
    q: torch.Tensor
    layers: list[torch.Tensor]
    tables: torch.Tensor
    scale: float
    window: int | None

    @property
    def block_size(self) -> int:
        return self.layers[0].shape[1]

    @property
    def kv_heads(self) -> int:
        return self.layers[0].shape[3]

    def numbers(self, values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """On the device of q."""
        return torch.tensor(values, dtype=dtype, device=self.q.device)

    def query_starts(self) -> list[int]:
        """[B + 1]."""
        starts = [0]
        for request in self.requests:
            starts.append(starts[-1] + request.tokens)
        return starts

    def dense(self, layer: int, request: int) -> torch.Tensor:
        """Keys and values of a request without pages: [L, 2, Hkv, D]."""
        keys = self.requests[request].keys
        blocks = self.tables[request, : -(-keys // self.block_size)]
        return self.layers[layer][blocks].flatten(0, 1)[:keys]

    def error(self, layer: int, out: torch.Tensor) -> float:
        """The largest relative error among the first and the last request's last rows. out: [T, Hq, D]."""
        starts = self.query_starts()
        errors = []
        for number in {0, len(self.requests) - 1}:
            rows = min(CHECKED_ROWS, self.requests[number].tokens)
            last = slice(starts[number + 1] - rows, starts[number + 1])
            right = exact_attention(self.q[last], self.dense(layer, number), self.scale, self.window)
            errors.append(((out[last].float() - right).norm() / right.norm()).nan_to_num(nan=float("inf")))
        return float(torch.stack(errors).max())


def exact_attention(q: torch.Tensor, kv: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """float32 [R, Hq, D] of q [R, Hq, D], the last R positions of kv [L, 2, Hkv, D]."""
    rows, length = q.shape[0], kv.shape[0]
    keys, values = kv.float().repeat_interleave(q.shape[1] // kv.shape[2], dim=2).unbind(1)
    scores = torch.einsum("rhd,lhd->hrl", q.float(), keys) * scale
    position = torch.arange(length - rows, length, device=q.device)[:, None]
    key = torch.arange(length, device=q.device)[None, :]
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hrl,lhd->rhd", weights, values)


def make_inputs(
    requests: tuple[Request, ...],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    layers: int,
    device: torch.device,
    window: int | None = None,
    shared: int = 0,
    kv_dtype: torch.dtype = torch.bfloat16,
) -> AttentionInputs:
    """q in bfloat16. shared: keys, a multiple of block_size, that all requests have in the same blocks."""
    generator = torch.Generator(device).manual_seed(0)
    tables, blocks = _random_tables(requests, block_size, shared // block_size, device)
    storage = torch.empty(blocks, layers, block_size, 2, kv_heads, head_dim, dtype=kv_dtype, device=device)
    # A layer after the other: numbers of 8 bits are drawn as wider ones.
    for layer in storage.unbind(1):
        layer.copy_(
            torch.empty(layer.shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)
        )
    tokens = sum(request.tokens for request in requests)
    q = torch.empty(tokens, heads, head_dim, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    return AttentionInputs(requests, q, list(storage.unbind(1)), tables, head_dim**-0.5, window)


def _random_tables(
    requests: tuple[Request, ...], block_size: int, shared: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Tables of blocks in random order, the first `shared` columns the same for all, and how many blocks
    there are. Block 0 belongs to no request, as in the engine."""
    counts = [-(-request.keys // block_size) for request in requests]
    blocks = 1 + shared + sum(count - shared for count in counts)
    order = 1 + torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(0))
    tables = torch.zeros(len(requests), max(counts), dtype=torch.int64)
    tables[:, :shared] = order[:shared]
    taken = shared
    for row, count in enumerate(counts):
        tables[row, shared:count] = order[taken : taken + count - shared]
        taken += count - shared
    return tables.to(device), blocks
