"""torch's own attention over keys that lie next to each other: what paging costs, and what cuDNN and
FlashAttention 2, which it calls, do without it."""

from __future__ import annotations

import functools

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_inputs import AttentionInputs
from benchmarks.peers import Calls, Unsupported

NAME = "torch SDPA, keys not paged"
PACKAGE = "torch"


def prepare(inputs: AttentionInputs) -> Calls:
    first = inputs.requests[0]
    if any(request != first for request in inputs.requests):
        raise Unsupported("requests of different lengths")
    if inputs.window is not None:
        raise Unsupported("a window")
    count, heads = len(inputs.requests), inputs.q.shape[1]
    q = inputs.q.unflatten(0, (count, -1)).transpose(1, 2)
    mask = None if first.tokens == 1 else causal_lower_right(first.tokens, first.keys)

    def attend(kv: torch.Tensor) -> torch.Tensor:
        keys, values = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
        out = scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, scale=inputs.scale, enable_gqa=heads != inputs.kv_heads
        )
        return out.transpose(1, 2).flatten(0, 1)

    dense = [
        torch.stack([inputs.dense(layer, request) for request in range(count)])
        for layer in range(len(inputs.layers))
    ]
    return [functools.partial(attend, kv) for kv in dense]
