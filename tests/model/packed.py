"""Runs prompts through a model the way the engine does, and the eager reference."""

from __future__ import annotations

from typing import Any

import torch

from chiron_engine.model.attention import AttentionBatch, ChunkRows
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.self_check import run_paged


def random_prompts(
    vocab_size: int, lengths: tuple[int, ...] = (37, 9, 22), seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def paged_logits(
    model: Any, prompts: list[torch.Tensor], seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """All positions' logits from chunks and decodes in mixed batches over scattered blocks. dtype: of the
    pool."""
    with torch.inference_mode():
        return run_paged(model, prompts, torch.Generator().manual_seed(seed), model.spec.layers, dtype)


def eager_logits(model: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(input_ids=prompt[None], use_cache=False).logits[0].float() for prompt in prompts]


def relative_error(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, reference, strict=True))
    return difference / max(float(logits.abs().max()) for logits in reference)


def greedy(model: Any, prompt: list[int], count: int, chunk: int = 16, block_size: int = 16) -> list[int]:
    """`count` greedy tokens after `prompt`, prefilled in chunks."""
    blocks = -(-(len(prompt) + count) // block_size)
    pool = KvPool(blocks, block_size, model.spec.layers, model.precision.kv)
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(len(prompt)))
    tokens = list(prompt)
    none = torch.empty(0, dtype=torch.int64)
    with torch.inference_mode():
        for start in range(0, len(prompt), chunk):
            ids = torch.tensor(prompt[start : start + chunk])
            position = torch.arange(start, start + len(ids))
            rows = ChunkRows(0, len(ids), start, slot=0)
            where = table[position // block_size], position % block_size
            batch = AttentionBatch(0, table[None], none, none, 0, [rows], *where)
            logits = model.forward(ids, position, batch, pool, torch.tensor([len(ids) - 1]))
        tokens.append(int(logits.argmax()))
        while len(tokens) < len(prompt) + count:
            length, position = len(tokens), torch.tensor([len(tokens) - 1])
            where = table[position // block_size], position % block_size
            slots, lens = torch.tensor([0]), torch.tensor([length])
            batch = AttentionBatch(1, table[None], slots, lens, length, [], *where)
            logits = model.forward(torch.tensor(tokens[-1:]), position, batch, pool, torch.tensor([0]))
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]
