"""Triton's backend where decoding rows share prefixes, interpreted where there is no GPU: what torch's gives,
whatever the layer makes of scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chiron_engine.model.attention import AttentionBatch, ChunkRows, ScoreRule, TorchAttention
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.parts import backend_for
from chiron_engine.model.spec import LayerGeometry, ModelSpec
from chiron_engine.runtime.shared_prefixes import PrefixFinder, cascade_rule, prefix_finder
from tests.triton_interpreter import install

BLOCK = 16
HEADS, KV_HEADS, DIM = 4, 2, 32
SINKS = torch.tensor([0.5, -2.0, 7.0, 1.0])
RULES = {
    "plain": ScoreRule(0.3),
    "softcap": ScoreRule(0.3, softcap=1.5),
    "sinks": ScoreRule(0.3, sinks=SINKS),
    "window": ScoreRule(0.3, window=20),
    "window, softcap and sinks": ScoreRule(0.3, window=90, softcap=2.0, sinks=SINKS),
}


def step(device: torch.device, chunk: bool) -> AttentionBatch:
    """Slots 4, 2 and 5 with 3 blocks in common, 0 with a block more of those of 5, 1 alone; and in slot 3 a
    chunk of 9 tokens after 20."""
    slots, lens = [4, 1, 2, 5, 0], [70, 40, 49, 100, 81]
    tables = np.arange(1, 49, dtype=np.int64).reshape(6, 8)
    tables[[4, 2, 5, 0], :3] = tables[4, :3]
    tables[0, 3] = tables[5, 3]
    finder = PrefixFinder(cascade_rule(1, BLOCK), BLOCK)
    shared = finder.shared_prefixes(tables, np.array(slots), np.array(lens), device)
    positions = np.array([length - 1 for length in lens] + [*range(20, 29)] * chunk)
    rows = np.array(slots + [3] * 9 * chunk)
    numbers = torch.from_numpy(tables[rows, positions // BLOCK]), torch.from_numpy(positions % BLOCK)
    return AttentionBatch(
        len(slots),
        torch.from_numpy(tables).to(device),
        torch.tensor(slots, device=device),
        torch.tensor(lens, device=device),
        max(lens),
        [ChunkRows(len(slots), 9, 20, 3)] * chunk,
        *(each.to(device) for each in numbers),
        cascade=shared,
    )


@pytest.mark.parametrize("chunk", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_equals_torch(name: str, chunk: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        install()
    batch, rule = step(device, chunk), RULES[name]
    if rule.sinks is not None:
        rule = ScoreRule(rule.scale, rule.window, rule.softcap, rule.sinks.to(device))
    assert batch.cascade is not None and batch.cascade.starts.diff().tolist() == [4]
    generator = torch.Generator().manual_seed(0)
    pool = KvPool(49, BLOCK, [LayerGeometry(KV_HEADS, DIM)], torch.float32, device)
    pool.kv(0).copy_(torch.randn(pool.kv(0).shape, generator=generator))
    q, k, v = (
        torch.randn(5 + 9 * chunk, heads, DIM, generator=generator).to(device)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    found = []
    for backend in (backend_for(Kernels.TRITON, device), TorchAttention()):
        backend.begin(batch, pool)
        found.append(backend.attend(0, q, k, v, pool, batch, rule))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_only_layers_that_see_all_keys_count(tmp_path) -> None:
    def spec(windows: tuple[int | None, ...], *dims: int) -> ModelSpec:
        layers = tuple(LayerGeometry(2, dim) for dim in dims)
        return ModelSpec("m", "M", layers, 10, 100, (), tmp_path, windows)

    half = torch.bfloat16
    assert spec((), 64, 32).unwindowed_layers == (LayerGeometry(2, 64), LayerGeometry(2, 32))
    assert spec((4, None), 64, 32).unwindowed_layers == (LayerGeometry(2, 32),)
    assert prefix_finder(spec((4, 4), 64, 64), half, 16, None) is None
    assert prefix_finder(spec((), 512), half, 16, None) is None
    assert prefix_finder(spec((4, None), 64, 64), half, 16, None) is not None
    assert prefix_finder(spec((), 64), torch.float8_e4m3fn, 16, None) is not None
