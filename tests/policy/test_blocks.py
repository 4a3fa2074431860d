from __future__ import annotations

import pytest

from chiron_engine.policy.iteration.blocks import BlockPool, OutOfBlocks, chain_key, private_key, root_key

KEYS = [bytes([i]) * 16 for i in range(8)]


def sealed(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    pool.seal(blocks, KEYS, 0, count)
    return blocks


def test_released_content_is_found_until_its_block_is_given_away() -> None:
    pool = BlockPool(4)
    blocks = sealed(pool, 3)
    pool.release(blocks)
    assert pool.num_free == 4
    assert pool.find(KEYS[:3]) == blocks
    pool.allocate(2)
    assert pool.find(KEYS[:3]) == blocks[:2], "the tail of a prefix goes first"
    pool.check([[b for b in range(4) if b not in blocks[:2]]])


def test_the_least_recently_released_prefix_is_given_away_first() -> None:
    pool = BlockPool(2)
    first, second = sealed(pool, 2)
    pool.release([second])
    pool.release([first])
    assert pool.allocate(1) == [second]
    assert pool.find(KEYS[:1]) == [first]


def test_an_acquired_block_is_not_given_away() -> None:
    pool = BlockPool(2)
    blocks = sealed(pool, 2)
    pool.release(blocks)
    pool.acquire(blocks[:1])
    assert pool.count_cached(blocks) == 1
    assert pool.allocate(1) == blocks[1:]
    with pytest.raises(OutOfBlocks, match="1 blocks asked for, 0 of 2 free"):
        pool.allocate(1)
    with pytest.raises(OutOfBlocks, match="3 blocks asked for, 0 of 2 free"):
        pool.allocate(3)


def test_equal_content_is_indexed_once_and_both_blocks_stay_usable() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.seal([first], KEYS, 0, 1)
    pool.seal([second], KEYS, 0, 1)
    assert pool.find(KEYS[:1]) == [first]
    pool.release([first, second])
    pool.check([])


def test_a_run_ends_at_the_first_key_that_is_not_found() -> None:
    pool = BlockPool(3)
    blocks = sealed(pool, 3)
    assert pool.find([KEYS[0], KEYS[5], KEYS[2]]) == blocks[:1]
    assert pool.find(KEYS, start=1, stop=2) == blocks[1:2]


def test_releasing_too_often_is_an_error() -> None:
    pool = BlockPool(1)
    pool.release(pool.allocate(1))
    with pytest.raises(ValueError, match="released more often"):
        pool.release([0])


def test_keys_name_tokens_and_all_that_came_before() -> None:
    root = root_key(b"")
    assert chain_key(root, [1, 2]) == chain_key(root, (1, 2))
    different = {
        chain_key(root, [1, 2]),
        chain_key(root, [2, 1]),
        chain_key(chain_key(root, [1, 2]), [1, 2]),
        chain_key(root_key(b"tenant"), [1, 2]),
        private_key(1, 2),
        private_key(12, 0),
    }
    assert len(different) == 6


def test_an_unused_pool_takes_no_memory_for_its_blocks() -> None:
    pool = BlockPool(1 << 40)
    assert pool.num_free == 1 << 40
    blocks = pool.allocate(3)
    pool.release(blocks[:1])
    assert len(pool._count) == 3 and pool.num_free == (1 << 40) - 2
    assert pool.allocate(1) == blocks[:1], "what was used comes before what never was"
    pool.check([blocks])
