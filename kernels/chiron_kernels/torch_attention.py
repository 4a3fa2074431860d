"""Attention over paged KV in plain torch. The reference for the Triton kernels, and what runs on
the CPU.

Shapes: T rows, B decoding requests, Hq query heads, Hkv key and value heads, G = Hq / Hkv,
D head size, L keys. Query head h reads key head h // G.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(cap(scale q k^T) + mask) v, for q [N, H, T, D] and k, v [N, H or 1, L, D].

    mask: additive, broadcast to [N, H, T, L]. softcap c: scores become c tanh(score / c), before
    the mask (Gemma 2). sinks, broadcast to [N, H, T, 1]: a logit that joins the softmax's sum and
    has no value (gpt-oss). The last two are computed in float32 outside the fused kernel.
    """
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        return torch.softmax(scores, dim=-1).to(v.dtype) @ v
    column = sinks.float().expand(*scores.shape[:-1], 1)
    weights = torch.softmax(torch.cat((scores, column), dim=-1), dim=-1)
    return weights[..., :-1].to(v.dtype) @ v


def decode_mask(
    lens: torch.Tensor, first: torch.Tensor, length: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """Additive mask [B, 1, 1, length] over gathered keys whose first has position `first` [B].

    A row sees positions 0 .. lens - 1; with a window only the last `window` of them.
    """
    position = first[:, None] + torch.arange(length, device=lens.device)
    hidden = position >= lens[:, None]
    if window is not None:
        hidden |= position < lens[:, None] - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lens.device)
    return mask.masked_fill_(hidden, float("-inf"))[:, None, None, :]


def decode_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query per request. q [B, Hq, D], kv [B, L, 2, Hkv, D] gathered, mask [B, 1, 1, L];
    sinks [Hq]. Returns [B, Hq, D]. The G heads of a group are the query rows of one key head."""
    kv_heads = kv.shape[3]
    grouped = q.unflatten(1, (kv_heads, -1))
    keys, values = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
    if sinks is not None:
        sinks = sinks.view(1, kv_heads, -1, 1)
    return masked_attention(grouped, keys, values, mask, scale, softcap, sinks).flatten(1, 2)


def chunk_mask(
    count: int, context: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Additive mask [count, context + count]: row i has position context + i and sees itself and
    what is before; with a window only the last `window` of these."""
    key = torch.arange(context + count, device=device)
    row = key[context:, None]
    hidden = key > row
    if window is not None:
        hidden |= key <= row - window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """A run of prompt rows. q [T, Hq, D], k and v [L, Hkv, D] with L >= T, mask [T, L] from
    `chunk_mask`; sinks [Hq]. Returns [T, Hq, D]. No mask means plain causal with L = T."""
    kv_heads = k.shape[1]
    grouped = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    groups = grouped.shape[1]
    keys = k.transpose(0, 1)[:, None].expand(-1, groups, -1, -1)
    values = v.transpose(0, 1)[:, None].expand(-1, groups, -1, -1)
    if mask is None and softcap is None and sinks is None:
        out = scaled_dot_product_attention(grouped, keys, values, is_causal=True, scale=scale)
        return out.permute(2, 0, 1, 3).flatten(1, 2)
    if mask is None:
        mask = chunk_mask(q.shape[0], 0, None, q.dtype, q.device)
    if sinks is not None:
        sinks = sinks.view(kv_heads, -1, 1, 1)
    out = masked_attention(grouped, keys, values, mask, scale, softcap, sinks)
    return out.permute(2, 0, 1, 3).flatten(1, 2)
