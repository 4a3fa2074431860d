"""Blocks of the KV pools copied between scattered rows."""

from __future__ import annotations

import pytest
import torch
from chiron_kernels.gpu.block_copy import PIECE_WORDS, copy_blocks, gather_blocks, scatter_blocks
from chiron_kernels.reference import block_copy as reference

from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.spec import LayerGeometry
from chiron_engine.policy.iteration.plan import BlockCopy
from chiron_engine.runtime.kv_transfer import KvTransfer

PIECE = 4 * PIECE_WORDS
SIZES = (64, 192, PIECE - 64, PIECE, PIECE + 64)


def random_blocks(count: int, size: int, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, size), dtype=torch.uint8, generator=generator).to(device)


def rows(*indices: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int64, device=device)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("copy", [copy_blocks, reference.copy_blocks])
def test_copies_scattered_blocks_and_nothing_else(size: int, copy, device: torch.device) -> None:
    source, target = (random_blocks(7, size, device, seed) for seed in (1, 2))
    source_before, target_before = source.clone(), target.clone()
    copy(source, rows(6, 0, 3, 3, device=device), target, rows(1, 5, 0, 6, device=device))
    assert torch.equal(source, source_before)
    assert torch.equal(target[[1, 5, 0, 6]], source_before[[6, 0, 3, 3]])
    assert torch.equal(target[2:5], target_before[2:5])


@pytest.mark.parametrize("size", [64, PIECE + 64])
@pytest.mark.parametrize(
    ("gather", "scatter"),
    [(gather_blocks, scatter_blocks), (reference.gather_blocks, reference.scatter_blocks)],
)
def test_through_a_dense_buffer(size: int, gather, scatter, device: torch.device) -> None:
    source, buffer, target = (random_blocks(5, size, device, seed) for seed in (1, 2, 3))
    buffer_before, target_before = buffer.clone(), target.clone()
    gather(source, rows(4, 0, 2, device=device), buffer)
    assert torch.equal(buffer[:3], source[[4, 0, 2]])
    assert torch.equal(buffer[3:], buffer_before[3:])
    scatter(buffer, target, rows(3, 1, device=device))
    assert torch.equal(target[[3, 1]], source[[4, 0]])
    assert torch.equal(target[[0, 2, 4]], target_before[[0, 2, 4]])


def test_blocks_that_lie_apart(device: torch.device) -> None:
    wide = random_blocks(4, 320, device, 1)
    before = wide.clone()
    copy_blocks(wide[:, 64:192], rows(3, 1, device=device), wide[:, 192:], rows(0, 2, device=device))
    assert torch.equal(wide[[0, 2], 192:], before[[3, 1], 64:192])
    assert torch.equal(wide[:, :192], before[:, :192])
    assert torch.equal(wide[[1, 3], 192:], before[[1, 3], 192:])


def test_no_blocks(device: torch.device) -> None:
    source, target = (random_blocks(2, 64, device, seed) for seed in (1, 2))
    before = target.clone()
    copy_blocks(source, rows(device=device), target, rows(device=device))
    assert torch.equal(target, before)


def test_blocks_far_apart(device: torch.device) -> None:
    """The last block begins past 2^31 words of 4 bytes. Only what is touched takes memory on the CPU."""
    stride = 4 * 2**31 // 2 + 64
    memory = torch.empty(2 * stride + 64, dtype=torch.uint8, device=device)
    far = memory.as_strided((3, 64), (stride, 1))
    source, back = random_blocks(2, 64, device, 1), random_blocks(2, 64, device, 2)
    far.fill_(0)
    copy_blocks(source, rows(0, 1, device=device), far, rows(2, 0, device=device))
    assert torch.equal(far[[2, 0]], source)
    assert not far[1].any()
    copy_blocks(far, rows(2, 0, device=device), back, rows(1, 0, device=device))
    assert torch.equal(back[[1, 0]], source)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("source", lambda x: x[0], r"source is \[128\]; it must be \[any, any\]"),
        ("source", lambda x: x.int(), "source is int32; it must be uint8"),
        ("source", lambda x: x[:, ::2], "source has stride 2 in its last dimension"),
        ("source", lambda x: x[:, :96], "source has blocks of 96 bytes; they must be multiples of 64"),
        ("source", lambda x: x.repeat(1, 2)[:, 32:160], "source has blocks 256 bytes apart from 32 on"),
        ("source", lambda x: x.to("meta"), "source is on meta; it must be on .* or in pinned memory"),
        ("target", lambda x: x[:, :64], r"target is \[3, 64\]; it must be \[any, 128\]"),
        ("target", lambda x: x.to("meta"), "target is on meta"),
        ("source_rows", lambda x: x[:, None], r"source_rows is \[2, 1\]; it must be \[any\]"),
        ("source_rows", lambda x: x.int(), "source_rows is int32; it must be int64"),
        ("target_rows", lambda x: x[:1], r"target_rows is \[1\]; it must be \[2\]"),
        ("target_rows", lambda x: x.repeat(2)[::2], "target_rows has stride 2"),
        ("target_rows", lambda x: x.to("meta"), "target_rows is on meta"),
    ],
)
def test_bad_arguments_are_named(name: str, change, says: str, device: torch.device) -> None:
    given = {
        "source": random_blocks(3, 128, device, 1),
        "source_rows": rows(0, 1, device=device),
        "target": random_blocks(3, 128, device, 2),
        "target_rows": rows(2, 0, device=device),
    }
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=says):
        copy_blocks(**given)


def test_a_buffer_too_small_is_refused(device: torch.device) -> None:
    blocks = random_blocks(4, 64, device, 1)
    with pytest.raises(ValueError, match="target has 2 blocks; it must have 3 or more"):
        gather_blocks(blocks, rows(0, 1, 2, device=device), blocks[:2])
    with pytest.raises(ValueError, match="source has 2 blocks; it must have 3 or more"):
        scatter_blocks(blocks[:2], blocks, rows(0, 1, 2, device=device))


def test_the_host_tier_copies_by_it(device: torch.device) -> None:
    """What `KvTransfer` does with many small copies, there and back."""
    layers = [LayerGeometry(1, 8)]
    pool, host = KvPool(20, 4, layers, torch.float16, device), KvPool(18, 4, layers, torch.float16)
    if device.type == "cuda":
        host = KvPool(18, 4, layers, torch.float16, pinned=True)
    pool.storage.random_()
    host.storage.random_()
    before, host_before = pool.storage.clone(), host.storage.clone()
    launches = []

    def counted(*arguments: torch.Tensor) -> None:
        launches.append(len(arguments[1]))
        copy_blocks(*arguments)

    transfer = KvTransfer(pool, host, copy_blocks=counted)
    transfer.copy_out([BlockCopy(i, 17 - i) for i in range(16)])
    transfer.copy_in([BlockCopy(19 - i, 17 - i) for i in range(16)])
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert launches == [16, 16]
    assert torch.equal(host.storage[2:].flip(0), before[:16].to(host.storage.device))
    assert torch.equal(host.storage[:2], host_before[:2])
    assert torch.equal(pool.storage[4:].flip(0), before[:16])
