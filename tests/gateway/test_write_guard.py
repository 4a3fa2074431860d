"""One timer for all writes of a stream notices each that takes too long, on time."""

from __future__ import annotations

import asyncio

import pytest

from chiron_engine.gateway.write_guard import WriteGuard

LIMIT_S = 0.5  # far above how late a busy machine wakes a sleeper


@pytest.mark.parametrize("quick_writes", [0, 1, 7])
def test_a_write_under_way_for_too_long_is_ended_whatever_came_before(quick_writes: int) -> None:
    async def check() -> float:
        loop = asyncio.get_running_loop()
        began = 0.0
        with pytest.raises(TimeoutError):
            async with WriteGuard(LIMIT_S) as guard:
                for _ in range(quick_writes):
                    guard.began()
                    await asyncio.sleep(0.4 * LIMIT_S)
                    guard.ended()
                guard.began()
                began = loop.time()
                await asyncio.sleep(60.0)
        return loop.time() - began

    assert LIMIT_S * 0.99 <= asyncio.run(check()) < 20 * LIMIT_S


def test_many_writes_and_long_waits_between_them_are_let_be() -> None:
    async def check() -> None:
        async with WriteGuard(LIMIT_S) as guard:
            for _ in range(30):
                guard.began()
                await asyncio.sleep(LIMIT_S / 20)
                guard.ended()
            await asyncio.sleep(3 * LIMIT_S)

    asyncio.run(check())


def test_its_timer_ends_with_the_stream_and_other_errors_pass() -> None:
    async def check() -> None:
        with pytest.raises(KeyError):
            async with WriteGuard(LIMIT_S) as guard:
                guard.began()
                raise KeyError
        await asyncio.sleep(2 * LIMIT_S)  # a timer left behind would cancel this task

    asyncio.run(check())
