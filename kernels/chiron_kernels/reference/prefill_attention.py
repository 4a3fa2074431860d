"""Attention of chunks of prompts over the paged keys and values."""

from __future__ import annotations

import torch

from chiron_kernels.gpu.query_blocks import QueryBlocks


def prefill_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    table_rows: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    blocks: QueryBlocks | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    max_len: int | None = None,
    splits: int | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    causal: bool = True,
) -> torch.Tensor:
    """Each row's softmax-weighted mean of the values it sees: [T, Hq, D], as q; zeros for rows in no chunk.

    q: [T, Hq, D]. kv: [num_blocks, block_size, 2, Hkv, D]. tables: [S, W]. table_rows: [C]. query_starts:
    [C + 1]. context_lens: [C]. Row i of chunk c sees keys 0 .. context_lens[c] + i of the blocks that row
    table_rows[c] of tables names, with a window only the last `window` of them. softcap c: a score becomes
    c tanh(score / c). sinks: [Hq], a score without a value. lse: [T, Hq], written: the natural logarithm of
    the softmax's sum. k_scale, v_scale: keys and values are so many times what the pool holds. blocks,
    max_len and splits say how the kernel shares the work, and change nothing here. Without `causal`, every
    row of chunk c sees keys 0 .. context_lens[c] - 1 instead. float64 is computed with as it is, all else in
    float32.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    starts, table_of = query_starts.tolist(), table_rows.tolist()
    for chunk, context in enumerate(context_lens.tolist()):
        start, end = starts[chunk], starts[chunk + 1]
        if start == end:
            continue
        length = context + end - start if causal else context
        table = tables[table_of[chunk], : -(-length // kv.shape[1])]
        position = torch.arange(context, context + end - start, device=q.device)
        key = torch.arange(length, device=q.device)
        hidden = key > position[:, None]
        if window is not None:
            hidden |= key <= position[:, None] - window
        used = ~hidden.all(dim=0)
        # What no row sees may be anything, and 0 times that is not always 0.
        pages = kv[table].flatten(0, 1)[:length].to(wide)
        pages = torch.where(used[:, None, None, None], pages, 0.0)
        pages = pages.repeat_interleave(q.shape[1] // kv.shape[3], dim=2)
        score = torch.einsum("thd,khd->htk", q[start:end].to(wide), pages[:, 0]) * (scale * k_scale)
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        score = score.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            sink = sinks.to(wide)[:, None, None].expand(-1, end - start, 1)
            score = torch.cat((score, sink), dim=-1)
        weight = torch.softmax(score, dim=-1)[..., :length]
        out[start:end] = torch.einsum("htk,khd->thd", weight, pages[:, 1] * v_scale).to(q.dtype)
        if lse is not None:
            lse[start:end] = torch.logsumexp(score, dim=-1).T
    return out
