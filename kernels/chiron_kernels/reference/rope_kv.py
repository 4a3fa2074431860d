"""Norm and rotation of queries and keys, and keys and values into the paged pool."""

from __future__ import annotations

import torch

from chiron_kernels.reference.kv_write import kv_write


def _normalised(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotary = cos.shape[-1]
    turning, rest = x[..., :rotary], x[..., rotary:]
    turned = turning * cos.float() + turning.roll(rotary // 2, -1) * sin.float()
    return torch.cat((turned, rest), dim=-1)


def rope_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    write_blocks: torch.Tensor,
    write_offsets: torch.Tensor,
    heads: int,
    kv_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """The rotated queries [T, heads, D]; rotated keys and values go to kv[write_blocks[t], write_offsets[t]].

    qkv: [T, (heads + 2 kv_heads) D]. cos, sin: [T, 1, R], sin signed: x cos + roll(x, R / 2) sin for the
    first R elements of a head, R even and up to D. q_norm, k_norm: both or none, [D], of the root-mean-square
    norm before. In float32, rounded once at the end. k_scale, v_scale: for a pool of 8 bits."""
    packed = qkv.unflatten(1, (heads + 2 * kv_heads, -1))
    q, k, v = packed.split((heads, kv_heads, kv_heads), dim=1)
    q = _rotated(_normalised(q.float(), q_norm, eps), cos, sin).to(qkv.dtype)
    k = _rotated(_normalised(k.float(), k_norm, eps), cos, sin)
    kv_write(k, v, kv, write_blocks, write_offsets, k_scale, v_scale)
    return q
