"""FlashAttention 4 over the same paged keys: prompts, on Hopper and later."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.attention_inputs import AttentionInputs
from benchmarks.peers import Calls, Unsupported

NAME = "FlashAttention 4"
PACKAGE = "flash_attn.cute"


def prepare(inputs: AttentionInputs) -> Calls:
    """Without division of keys over programs, which it has not on Hopper, decodes would not be its best."""
    if any(request.tokens == 1 for request in inputs.requests):
        raise Unsupported("decodes: no split of the keys on Hopper")
    from flash_attn.cute import flash_attn_varlen_func

    options = {
        "cu_seqlens_q": inputs.numbers(inputs.query_starts(), torch.int32),
        "seqused_k": inputs.numbers([request.keys for request in inputs.requests], torch.int32),
        "page_table": inputs.tables.int(),
        "softmax_scale": inputs.scale,
        "causal": True,
        "window_size": (None, None) if inputs.window is None else (inputs.window - 1, 0),
    }
    return [functools.partial(_run, flash_attn_varlen_func, inputs.q, kv, options) for kv in inputs.layers]


def _run(attend: Any, q: torch.Tensor, kv: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    out = attend(q, kv[:, :, 0], kv[:, :, 1], **options)
    return out[0] if isinstance(out, tuple) else out
