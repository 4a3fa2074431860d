"""Models over a KV pool of 8 bits in torch: what is stored and what comes of it are those of the kernels'
references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chiron_kernels.gpu.paged_kv import EIGHT_BITS
from chiron_kernels.reference.decode_attention import decode_attention
from chiron_kernels.reference.kv_write import kv_write
from chiron_kernels.reference.prefill_attention import prefill_attention
from chiron_kernels.reference.rope_kv import rope_kv_write
from safetensors.torch import load_file, save_file

from chiron_engine.model import hugging_face, native
from chiron_engine.model.attention import AttentionBatch, ScoreRule
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.kv_scales import KvScales, LayerScales
from chiron_engine.model.loader import CausalLM, load_model
from chiron_engine.model.parts import Parts, parts_for
from chiron_engine.model.precision import Precision
from chiron_engine.model.rope import Angles
from chiron_engine.model.self_attention import HeadNorms, Heads
from tests.model.packed import paged_logits

TIGHT_SCALES = {0: KvScales(1 / 4000, 1 / 4000), 1: KvScales(1 / 2500)}
"""For the tiny model of `scripts.gpu_suite.random_llama`: so small that many of its keys and values are over
the largest number, and without them its tokens are others."""


class ReferenceAttention:
    """The attention backend of Hugging Face's models."""

    def __init__(self, scales: LayerScales) -> None:
        self._scales = scales

    def begin(self, batch: AttentionBatch, pool: KvPool) -> None:
        """Nothing is kept from pass to pass."""

    def scales_of(self, layer: int) -> tuple[float, float]:
        scales = self._scales.get(layer, KvScales())
        return scales.keys, scales.values

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool: KvPool,
        batch: AttentionBatch,
        rule: ScoreRule,
    ) -> torch.Tensor:
        kv_write(k, v, pool.kv(layer), batch.write_blocks, batch.write_offsets, *self.scales_of(layer))
        return self.attend_stored(layer, q, pool, batch, rule)

    def attend_stored(
        self, layer: int, q: torch.Tensor, pool: KvPool, batch: AttentionBatch, rule: ScoreRule
    ) -> torch.Tensor:
        """In float64."""
        k_scale, v_scale = self.scales_of(layer)
        kv, count, wide = pool.kv(layer), batch.num_decodes, q.double()
        options = {"window": rule.window, "softcap": rule.softcap, "sinks": rule.sinks}
        options |= {"k_scale": k_scale, "v_scale": v_scale}
        decoded = decode_attention(
            wide[:count], kv, batch.tables, batch.decode_slots, batch.decode_lens, None, rule.scale, **options
        )
        chunks = batch.chunks
        starts = torch.tensor([0, *(chunk.count for chunk in chunks)]).cumsum(0)
        slots, contexts = (
            torch.tensor([getattr(chunk, name) for chunk in chunks]) for name in ("slot", "context")
        )
        attended = prefill_attention(
            wide[count:], kv, batch.tables, slots, starts, contexts, None, rule.scale, **options
        )
        return torch.cat((decoded, attended)).to(q.dtype)


class ReferenceSelfAttention:
    """What stands between the products of a native layer."""

    def __init__(self, heads: Heads, attention: ReferenceAttention) -> None:
        self._heads, self._attention = heads, attention

    def attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        angles: Angles,
        batch: AttentionBatch,
        pool: KvPool,
        rule: ScoreRule,
    ) -> torch.Tensor:
        heads = self._heads
        weights = (None, None) if norms is None else (norms.query, norms.key)
        places = pool.kv(layer), batch.write_blocks, batch.write_offsets
        scales = self._attention.scales_of(layer)
        q = rope_kv_write(qkv, *angles, *places, heads.queries, heads.keys, *weights, heads.eps, *scales)
        return self._attention.attend_stored(layer, q, pool, batch, rule).flatten(1)


def reference(path: Path, precision: Precision, scales: LayerScales) -> CausalLM:
    """The model in torch, for a pool of 8 bits with these scales."""
    attention = ReferenceAttention(scales)

    def parts(precision: Precision, device: torch.device, *_: object) -> Parts:
        found = parts_for(precision, device, Kernels.TORCH)
        return replace(found, self_attention=lambda heads: ReferenceSelfAttention(heads, attention))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "parts_for", parts)
        patch.setattr(hugging_face, "backend_for", lambda *_: attention)
        stored = replace(precision, kv=EIGHT_BITS)
        return load_model(path, precision=stored, device=torch.device("cpu"), kernels=Kernels.TORCH)


def shortfall(model: CausalLM, known: list[int], tokens: list[int]) -> float:
    """By how much at most a token of `tokens`, which follow the known ones, has a lower logit than the best,
    relative to the largest. model: one of `reference`."""
    (logits,) = paged_logits(model, [torch.tensor([*known, *tokens])], dtype=EIGHT_BITS)
    before = logits[len(known) - 1 : -1]
    taken = before.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float(((before.max(dim=1).values - taken) / before.abs().max()).max())


def add_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """To the first file of weights of a model directory."""
    file = str(min(path.glob("*.safetensors")))
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def write_scales(path: Path, scales: LayerScales) -> None:
    for layer, scale in scales.items():
        prefix = f"model.layers.{layer}.self_attn."
        values = {f"{prefix}k_scale": scale.keys, f"{prefix}v_scale": scale.values}
        add_tensors(path, {name: torch.tensor([value]) for name, value in values.items()})
