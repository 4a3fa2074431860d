"""A causal LM of two small layers over the real pool and attention backend, and the same model
computed over whole sequences with no cache at all."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from chiron_engine.model.attention import AttentionBatch, ScoreRule
from chiron_engine.model.kernel_choice import Kernels, best_kernels
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.parts import backend_for
from chiron_engine.model.precision import FLOAT32
from chiron_engine.model.spec import LayerGeometry, ModelSpec

HEADS, KV_HEADS, HEAD_DIM, VOCAB, CONTEXT = 4, 2, 16, 211, 256
LAYERS = 2
WIDTH = HEADS * HEAD_DIM
RULE = ScoreRule(HEAD_DIM**-0.5)


class TinyCausalLM:
    """Learned positions, pre-norm attention and a two-layer MLP; weights from `seed`."""

    def __init__(self, seed: int = 0, device: str = "cpu", kernels: Kernels | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device)

        self.spec = ModelSpec(
            "tiny", "TinyCausalLM", (LayerGeometry(KV_HEADS, HEAD_DIM),) * LAYERS, VOCAB, CONTEXT, (), Path()
        )
        self.precision, self.kernels = FLOAT32, kernels or best_kernels(torch.device(device))
        self.capturable = self.kernels is Kernels.TRITON
        self.embedding = weights(VOCAB, WIDTH, scale=1.0)
        self.positions = weights(CONTEXT, WIDTH, scale=0.5)
        inner = WIDTH + 2 * KV_HEADS * HEAD_DIM
        self.qkv = [weights(inner, WIDTH, scale=WIDTH**-0.5) for _ in range(LAYERS)]
        self.out = [weights(WIDTH, WIDTH, scale=WIDTH**-0.5) for _ in range(LAYERS)]
        self.mlp = [weights(WIDTH, WIDTH, scale=WIDTH**-0.5) for _ in range(LAYERS)]
        on_gpu = self.kernels is Kernels.TRITON
        self.backend = backend_for(self.kernels if on_gpu else Kernels.TORCH, torch.device(device))

    def forward(
        self, input_ids: Tensor, positions: Tensor, batch: AttentionBatch, pool: KvPool, sample_rows: Tensor
    ) -> Tensor:
        self.backend.begin(batch, pool)
        x = self.embedding[input_ids] + self.positions[positions]
        for layer in range(LAYERS):
            q, k, v = self._qkv(x, layer)
            attended = self.backend.attend(layer, q, k, v, pool, batch, RULE)
            x = self._after_attention(x, attended.flatten(1), layer)
        return x[sample_rows] @ self.embedding.T

    def logits_of(self, token_ids: list[int]) -> Tensor:
        """[vocab] logits after the last token, over the whole sequence at once."""
        device = self.embedding.device
        x = self.embedding[torch.tensor(token_ids, device=device)] + self.positions[: len(token_ids)]
        mask = torch.full((len(token_ids),) * 2, -torch.inf, device=device).triu(1)
        for layer in range(LAYERS):
            q, k, v = self._qkv(x, layer)
            k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
            scores = torch.einsum("thd,shd->hts", q, k) * HEAD_DIM**-0.5 + mask
            attended = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
            x = self._after_attention(x, attended.flatten(1), layer)
        return x[-1] @ self.embedding.T

    def _qkv(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        normed = torch.nn.functional.layer_norm(x, (WIDTH,))
        packed = (normed @ self.qkv[layer].T).unflatten(1, (-1, HEAD_DIM))
        return packed[:, :HEADS], packed[:, HEADS : HEADS + KV_HEADS], packed[:, HEADS + KV_HEADS :]

    def _after_attention(self, x: Tensor, attended: Tensor, layer: int) -> Tensor:
        x = x + attended @ self.out[layer].T
        return x + torch.tanh(torch.nn.functional.layer_norm(x, (WIDTH,)) @ self.mlp[layer].T)
