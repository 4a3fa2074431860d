from __future__ import annotations

from chiron_engine.policy.iteration.kv_tiers import KvTiers, SwapCosts
from chiron_engine.policy.iteration.request import Request
from tests.core.engines import make_request

SAVE = SwapCosts(0.0, 0.0, 1.0)


def running(tiers: KvTiers, request: Request) -> Request:
    """Place a request and have its prompt computed."""
    tiers.enter(request, tiers.place(request, len(request.prompt_ids)))
    tiers.seal(request, 0, len(request.prompt_ids))
    return request


def test_an_evicted_prefix_is_pinned_on_the_host_and_found_again() -> None:
    tiers = KvTiers(4, 4, 3, SAVE, prefix_caching=True)
    request = running(tiers, make_request(0, 14))
    copies = tiers.evict(request, 14)
    assert len(copies) == len(request.host_blocks) == 3
    assert (tiers.device.num_free, tiers.host.num_free) == (4, 0)
    other = running(tiers, make_request(1, 16))  # takes every device block
    tiers.leave(other)
    placement = tiers.place(request, 15)
    assert (placement.device, placement.host, placement.fresh) == ([], request.host_blocks, 1)
    assert [c.host for c in tiers.enter(request, placement)] == placement.host
    assert request.host_blocks == []


def test_a_second_eviction_copies_only_what_is_new() -> None:
    tiers = KvTiers(4, 8, 8, SAVE, prefix_caching=True)
    request = running(tiers, make_request(0, 9))
    assert len(tiers.evict(request, 9)) == 2
    tiers.enter(request, tiers.place(request, 9))
    tiers.settle()
    request.output_ids.extend(range(4))
    tiers.grow(request, 12)
    assert len(tiers.evict(request, 12)) == 1
    assert len(request.host_blocks) == 3


def test_a_full_host_tier_saves_the_prefix_that_fits() -> None:
    tiers = KvTiers(4, 8, 2, SAVE, prefix_caching=True)
    request = running(tiers, make_request(0, 16))
    copies = tiers.evict(request, 16)
    assert [c.host for c in copies] == request.host_blocks and len(copies) == 2
    second = running(tiers, make_request(1, 16))
    assert tiers.evict(second, 16) == [] and second.host_blocks == []


def test_a_source_of_a_copy_in_is_no_target_of_a_copy_out_of_the_same_plan() -> None:
    """Copies out run before copies in, so the source must keep its content until the plan is made."""
    tiers = KvTiers(4, 5, 2, SAVE, prefix_caching=True)
    saved = running(tiers, make_request(0, 8))
    tiers.evict(saved, 8)
    tiers.leave(running(tiers, make_request(1, 20)))
    victim = running(tiers, make_request(2, 8))
    sources = {c.host for c in tiers.enter(saved, tiers.place(saved, 9))}
    assert len(sources) == 2
    assert tiers.evict(victim, 8) == [], "both host blocks are still sources"
    tiers.settle()
    assert tiers.host.num_free == 2


def test_without_prefix_caching_only_the_request_itself_finds_its_blocks() -> None:
    tiers = KvTiers(4, 8, 8, SAVE, prefix_caching=False)
    prompt = list(range(9))
    first = running(tiers, make_request(0, prompt))
    assert tiers.place(make_request(1, prompt), 9).device == []
    tiers.evict(first, 9)
    assert len(tiers.place(first, 9).device) == 2


def test_salted_requests_do_not_share() -> None:
    tiers = KvTiers(4, 8, 0, SAVE, prefix_caching=True)
    running(tiers, make_request(0, list(range(9))))
    stranger = make_request(1, list(range(9)))
    stranger.cache_salt = b"tenant"
    assert tiers.place(stranger, 9).device == []


def test_a_revived_block_counts_as_no_longer_free() -> None:
    tiers = KvTiers(4, 8, 0, SAVE, prefix_caching=True)
    tiers.leave(running(tiers, make_request(0, list(range(9)))))
    placement = tiers.place(make_request(1, list(range(12))), 12)
    assert (len(placement.device), placement.fresh, placement.free_needed) == (2, 1, 3)
    running(tiers, make_request(2, list(range(9))))
    assert tiers.place(make_request(3, list(range(12))), 12).free_needed == 1


def test_a_range_stands_for_unknown_tokens_and_shares_only_keys_given() -> None:
    tiers = KvTiers(4, 16, 16, SAVE, prefix_caching=True)
    first, second, third = (make_request(n) for n in range(3))
    for request in (first, second, third):
        request.prompt_ids = range(14)
    first.block_keys, second.block_keys = [7, 8], [7, 9]
    running(tiers, first)
    assert len(tiers.place(second, 14).device) == 1, "the block of key 7"
    assert tiers.place(third, 14).device == []
    tiers.evict(first, 14)
    assert len(first.block_keys) == 3, "the third block got a key of its own"
    assert len(tiers.place(first, 15).device) == 3
    running(tiers, third)
    assert tiers.device.num_free == 12, "blocks that nobody can share are not sealed"
    assert third.block_keys == []
