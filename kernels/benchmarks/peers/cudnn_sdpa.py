"""cuDNN's attention over the same paged keys, by its frontend's graphs."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.attention_inputs import AttentionInputs
from benchmarks.peers import Calls, Unsupported

NAME = "cuDNN"
PACKAGE = "cudnn"


def prepare(inputs: AttentionInputs) -> Calls:
    """One graph for all layers: they differ in their pointers alone."""
    first = inputs.requests[0]
    if any(request.tokens != first.tokens for request in inputs.requests):
        raise Unsupported("requests of different numbers of queries")
    if inputs.window is not None:
        raise Unsupported("a window")
    import cudnn

    count = len(inputs.requests)
    q = inputs.q.unflatten(0, (count, -1)).transpose(1, 2)  # [B, Hq, tokens, D], a view
    table = inputs.tables.int()[:, None, :, None]
    lengths = [
        inputs.numbers(values, torch.int32).view(count, 1, 1, 1)
        for values in ([first.tokens] * count, [request.keys for request in inputs.requests])
    ]
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        io_data_type=cudnn.data_type.BFLOAT16,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )
    symbols = [
        graph.tensor_like(tensor) for tensor in (q, *_heads_first(inputs.layers[0]), table, table, *lengths)
    ]
    out, _ = graph.sdpa(
        q=symbols[0],
        k=symbols[1],
        v=symbols[2],
        paged_attention_k_table=symbols[3],
        paged_attention_v_table=symbols[4],
        seq_len_q=symbols[5],
        seq_len_kv=symbols[6],
        paged_attention_max_seq_len_kv=inputs.tables.shape[1] * inputs.block_size,
        use_padding_mask=True,
        use_causal_mask_bottom_right=first.tokens > 1,
        attn_scale=inputs.scale,
        is_inference=True,
    )
    result = torch.empty_like(inputs.q)
    shaped = result.unflatten(0, (count, -1)).transpose(1, 2)
    out.set_output(True).set_dim(list(shaped.shape)).set_stride(list(shaped.stride()))
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=inputs.q.device)

    def attend(kv: torch.Tensor) -> torch.Tensor:
        tensors: list[Any] = [q, *_heads_first(kv), table, table, *lengths]
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        values = dict(zip([*symbols, out], [*tensors, shaped], strict=True))
        graph.execute(values, workspace, handle=handle)
        return result

    return [functools.partial(attend, kv) for kv in inputs.layers]


def _heads_first(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each [num_blocks, Hkv, block_size, D], views."""
    return kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
