"""The native decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3), over packed rows.

One flat pass: no module tree, no hooks, nothing from transformers. A row is one token of one
request; where its keys and values live is the attention backend's business.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from chiron_kernels.gpu.paged_kv import EIGHT_BITS, LARGEST_HEAD
from torch.nn.functional import embedding

from chiron_engine.model.attention import AttentionBatch, ScoreRule
from chiron_engine.model.checkpoint import Checkpoint
from chiron_engine.model.directory import CONFIG, eos_token_ids, model_name, read_json
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.kv_cache_dtype import check_kv_heads
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.kv_scales import is_attention_scale, read_kv_scales
from chiron_engine.model.llama_config import LlamaConfig, parse_config
from chiron_engine.model.parts import AnyLinear, MakeLinear, Parts, parts_for
from chiron_engine.model.precision import Precision
from chiron_engine.model.rope import Rope
from chiron_engine.model.self_attention import HeadNorms, Heads
from chiron_engine.model.spec import LayerGeometry, ModelSpec


class LlamaLayer:
    """One decoder layer: its weights, query, key and value packed into one matrix, gate and up
    into another."""

    __slots__ = ("down", "gated", "input_norm", "mlp_norm", "norms", "output", "qkv", "rule")

    def __init__(self, config: LlamaConfig, index: int, weights: Checkpoint, parts: Parts) -> None:
        prefix = f"model.layers.{index}."
        hidden, dim = config.hidden_size, config.head_dim
        query, key = config.heads * dim, config.kv_heads * dim

        def packed(
            block: str, rows: dict[str, int], columns: int, bias: bool, make: MakeLinear = parts.linear
        ) -> AnyLinear:
            names = [f"{prefix}{block}.{name}_proj" for name in rows]
            weight = weights.stack([f"{n}.weight" for n in names], [(r, columns) for r in rows.values()])
            if not bias:
                return make(weight)
            biases = weights.stack([f"{n}.bias" for n in names], [(r,) for r in rows.values()])
            return make(weight, biases)

        self.rule = ScoreRule(dim**-0.5, config.windows[index])
        self.input_norm = weights.read_copy(f"{prefix}input_layernorm.weight", (hidden,))
        self.mlp_norm = weights.read_copy(f"{prefix}post_attention_layernorm.weight", (hidden,))
        self.qkv = packed("self_attn", {"q": query, "k": key, "v": key}, hidden, config.qkv_bias)
        self.output = packed("self_attn", {"o": hidden}, query, config.output_bias)
        middle = config.intermediate_size
        self.gated = packed("mlp", {"gate": middle, "up": middle}, hidden, config.mlp_bias, parts.gated)
        self.down = packed("mlp", {"down": hidden}, middle, config.mlp_bias)
        self.norms = None
        if config.qk_norm:
            self.norms = HeadNorms(
                weights.read_copy(f"{prefix}self_attn.q_norm.weight", (dim,)),
                weights.read_copy(f"{prefix}self_attn.k_norm.weight", (dim,)),
            )


class LlamaModel:
    """A decoder of the Llama family, ready to run."""

    def __init__(
        self,
        path: Path,
        *,
        precision: Precision,
        device: torch.device,
        kernels: Kernels,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        raw = read_json(path / CONFIG)
        self.config = config = parse_config(raw)
        self.precision, self.kernels = precision, kernels
        # Larger heads go through torch's attention, which sizes its work by the longest row.
        self.capturable = kernels is Kernels.TRITON and config.head_dim <= LARGEST_HEAD
        self.spec = ModelSpec(
            name=model_name(path),
            architecture=config.architecture,
            layers=(LayerGeometry(config.kv_heads, config.head_dim),) * config.num_layers,
            vocab_size=config.vocab_size,
            max_model_len=config.max_position,
            eos_token_ids=eos_token_ids(path, raw),
            path=path,
            windows=config.windows,
        )
        check_kv_heads(self.spec.layers, precision)
        weights = Checkpoint(path, precision.compute, device)
        scales = read_kv_scales(weights) if precision.kv == EIGHT_BITS else None
        parts = parts_for(precision, device, kernels, scales)
        table = (config.vocab_size, config.hidden_size)
        # On the CPU the table is only looked up in, so that little of it need be in memory: the head is
        # packed apart from it even where the two are tied.
        self._embedding = weights.map("model.embed_tokens.weight", table)
        head = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
        shared = config.tied_embeddings and device.type != "cpu"
        self._head = parts.linear(self._embedding if shared else weights.read(head, table))
        self._norm = weights.read_copy("model.norm.weight", (config.hidden_size,))
        self._rope = Rope(config.rope, precision.compute, device)
        self._ops, self._backend = parts.ops, parts.backend
        heads = Heads(config.heads, config.kv_heads, config.head_dim, config.norm_eps)
        self._self_attention = parts.self_attention(heads)
        self._layers = []
        for index in range(config.num_layers):
            self._layers.append(LlamaLayer(config, index, weights, parts))
            if progress is not None:
                progress("load weights", (index + 1) / config.num_layers)
        weights.check_all_read(_is_derived)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        pool: KvPool,
        sample_rows: torch.Tensor,
    ) -> torch.Tensor:
        """Next-token logits, float32 [S, vocab_size], of the rows in `sample_rows` (int64 [S]);
        input_ids and positions are int64 [T]."""
        self._backend.begin(batch, pool)
        angles = self._rope.angles(positions)
        x = embedding(input_ids, self._embedding).to(self.precision.compute)
        ops, eps = self._ops, self.config.norm_eps
        delta = None
        for index, layer in enumerate(self._layers):
            x, normed = ops.add_norm(x, delta, layer.input_norm, eps)
            qkv = layer.qkv(normed)
            attended = self._self_attention.attend(index, qkv, layer.norms, angles, batch, pool, layer.rule)
            if layer is self._layers[-1]:  # of the other rows only keys and values were wanted
                x, attended = x[sample_rows], attended[sample_rows]
            x, normed = ops.add_norm(x, layer.output(attended), layer.mlp_norm, eps)
            delta = layer.down(layer.gated(normed))
        _, normed = ops.add_norm(x, delta, self._norm, eps)
        return self._head(normed).float()


def _is_derived(name: str) -> bool:
    """A tensor that some checkpoints carry and this decoder computes, ties to the embedding, or needs for KV
    of 8 bits alone."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq") or is_attention_scale(name)
