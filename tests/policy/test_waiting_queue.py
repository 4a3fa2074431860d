from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from chiron_engine.policy.iteration.waiting_queue import WaitingQueue, priority
from tests.core.engines import make_request


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.booleans()), max_size=30))
def test_the_head_is_always_the_smallest_priority(entries: list[tuple[bool, int, bool]]) -> None:
    queue = WaitingQueue()
    waiting = []
    for number, (batch, arrival, remove) in enumerate(entries):
        request = make_request(number, 3, batch=batch, arrival=float(arrival))
        queue.push(request)
        waiting.append(request)
        if remove:
            queue.remove(waiting.pop(0))
        assert queue.head is (min(waiting, key=priority) if waiting else None)
        assert queue.num_tokens == 3 * len(waiting) == 3 * len(queue)
    assert list(queue) == sorted(waiting, key=priority)
    while waiting:
        assert queue.pop() is min(waiting, key=priority)
        waiting.remove(min(waiting, key=priority))


def test_removing_what_does_not_wait_is_an_error() -> None:
    queue = WaitingQueue()
    queue.push(make_request(1))
    with pytest.raises(ValueError, match="request 2 is not waiting"):
        queue.remove(make_request(2))
