"""FlashInfer over the same paged keys. Its plan, which runs on the host once a step, is not timed."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.attention_inputs import AttentionInputs
from benchmarks.peers import Calls

NAME = "FlashInfer"
PACKAGE = "flashinfer"
WORKSPACE_BYTES = 256 << 20


def prepare(inputs: AttentionInputs) -> Calls:
    """Decodes of one new token by its decode kernels, on matrix units; all else by its prefill kernels."""
    import flashinfer

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device)
    decodes = all(request.tokens == 1 for request in inputs.requests)
    shape = {
        "num_qo_heads": inputs.q.shape[1],
        "num_kv_heads": inputs.kv_heads,
        "page_size": inputs.block_size,
        "q_data_type": inputs.q.dtype,
        "kv_data_type": inputs.q.dtype,
        "sm_scale": inputs.scale,
        "window_left": -1 if inputs.window is None else inputs.window - 1,
    }
    if decodes:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(*_pages(inputs), head_dim=inputs.q.shape[2], **shape)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        starts = inputs.numbers(inputs.query_starts(), torch.int32)
        wrapper.plan(starts, *_pages(inputs), head_dim_qk=inputs.q.shape[2], causal=True, **shape)
    return [functools.partial(_run, wrapper, inputs.q, kv) for kv in inputs.layers]


def _run(wrapper: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return wrapper.run(q, (kv[:, :, 0], kv[:, :, 1]))


def _pages(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the pages of each request start in the list of all, that list, and tokens in each last page."""
    counts = [-(-request.keys // inputs.block_size) for request in inputs.requests]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    pages = torch.cat([row[:count] for row, count in zip(inputs.tables, counts, strict=True)])
    last = [(request.keys - 1) % inputs.block_size + 1 for request in inputs.requests]
    return inputs.numbers(starts, torch.int32), pages.int(), inputs.numbers(last, torch.int32)
