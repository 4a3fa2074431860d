"""The batch store for an event loop: one thread of its own, and one commit for what waits together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from .batch_checks import BatchLimits
from .batch_errors import BatchStoreError
from .batch_store import BatchStore

MAX_GROUP = 100

T = TypeVar("T")
Operation = Callable[[BatchStore], Any]
Outcome = tuple[Any, BaseException | None]


class BatchStoreClosed(BatchStoreError):
    """The store is closed or closing; it takes no more calls."""


class BatchStoreThread:
    """Runs calls on the store in the order they come. A commit waits for the disk, so the calls that
    come meanwhile are committed together, at most MAX_GROUP of them; each succeeds or fails alone.
    Not thread-safe: for one event loop."""

    def __init__(self, store: BatchStore, thread: ThreadPoolExecutor) -> None:
        """Use `open`."""
        self.limits = store.limits
        self._store = store
        self._thread = thread
        self._waiting: deque[tuple[Operation, asyncio.Future[Any]]] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._is_closed = False

    @classmethod
    async def open(cls, directory: Path, limits: BatchLimits | None = None) -> Self:
        """Raises what `BatchStore` raises."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="batch-store")
        try:
            store = await asyncio.get_running_loop().run_in_executor(thread, BatchStore, directory, limits)
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return cls(store, thread)

    async def call(self, operation: Callable[[BatchStore], T]) -> T:
        """The result of `operation(store)`, which is on the disk by then. It runs in the store's
        thread, as one transaction, again after one that was undone with others, and also where the
        caller is cancelled meanwhile.

        Raises what it raises, and BatchStoreClosed.
        """
        if self._is_closed:
            raise BatchStoreClosed("the batch store is closed")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((operation, future))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run_groups())
        return await future

    async def close(self) -> None:
        """Finish the calls made so far and give the directory back. Safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._runner is not None:
            await self._runner
        await asyncio.get_running_loop().run_in_executor(self._thread, self._store.close)
        self._thread.shutdown()

    async def _run_groups(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            group = [self._waiting.popleft() for _ in range(min(MAX_GROUP, len(self._waiting)))]
            operations = [operation for operation, _ in group]
            outcomes = await loop.run_in_executor(self._thread, self._run_group, operations)
            for (_, future), (result, error) in zip(group, outcomes, strict=True):
                if future.done():  # its caller was cancelled
                    continue
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(result)
        self._runner = None

    def _run_group(self, operations: list[Operation]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        try:
            with self._store.transaction():
                for operation in operations:
                    outcomes.append(self._run(operation))
        except Exception:  # none of it was stored; what can be stored alone is
            return [self._run(operation) for operation in operations]
        return outcomes

    def _run(self, operation: Operation) -> Outcome:
        try:
            with self._store.transaction():
                return operation(self._store), None
        except Exception as error:
            return None, error
