from __future__ import annotations

import pytest
import torch

from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.spec import LayerGeometry

LAYERS = (LayerGeometry(2, 8), LayerGeometry(1, 16), LayerGeometry(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_one_row_that_holds_all_layers(dtype: torch.dtype) -> None:
    pool = KvPool(4, 8, LAYERS, dtype)
    assert pool.storage.shape == (4, pool.bytes_per_block)
    assert pool.bytes_per_block == KvPool.block_bytes(8, LAYERS, dtype)
    for index, layer in enumerate(LAYERS):
        assert pool.k(index).shape == pool.v(index).shape == (4, 8, layer.kv_heads, layer.head_dim)
        pool.k(index)[2] = index + 1
        pool.v(index)[2] = -(index + 1)
    assert not pool.storage[[0, 1, 3]].any()
    other = KvPool(2, 8, LAYERS, dtype)
    other.storage[1] = pool.storage[2]
    for index in range(len(LAYERS)):
        assert (other.k(index)[1] == index + 1).all() and (other.v(index)[1] == -(index + 1)).all()
        assert not other.k(index)[0].any()


def test_layers_do_not_overlap() -> None:
    pool = KvPool(1, 4, LAYERS, torch.float32)
    elements = sum(pool.k(i).numel() + pool.v(i).numel() for i in range(3))
    for index in range(3):
        pool.k(index).add_(1)
        pool.v(index).add_(1)
    assert int(pool.storage.view(torch.float32).sum()) == elements


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="a block of a token at least"):
        KvPool(0, 16, LAYERS, torch.float32)
