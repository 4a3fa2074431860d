"""From how many instances to have to which ones: roles change before anything is launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from .fleet_view import Decision, PoolTarget
from .instances import Instance, Instances
from .messages import InstanceState, Role

Action = Literal["launch", "set-role", "close", "open"]
LAUNCH: Action = "launch"
SET_ROLE: Action = "set-role"
CLOSE: Action = "close"
OPEN: Action = "open"


class Order:
    """One change: launch (instance None), a new role, closing, or opening again. role, target_s: of a
    launch or a new role."""

    __slots__ = ("action", "instance", "role", "target_s")

    def __init__(
        self, action: Action, instance: Instance | None, role: Role = Role.MIXED, target_s: float = 0.0
    ) -> None:
        self.action = action
        self.instance = instance
        self.role = role
        self.target_s = target_s


class Reconciler:
    """One decision against the instances there are. Interactive pools come first: what they lack
    they take from closing instances, then from batch ones, and only then from new devices; what
    they have over goes to batch if that lacks any, else it closes."""

    def __init__(self, instances: Instances, free_launches: int) -> None:
        staying = list(instances.staying())
        self._batch = [i for i in staying if i.role is Role.BATCH and not i.closing]
        self._closing = [i for i in staying if i.closing]
        self._serving = [i for i in staying if i.role is not Role.BATCH and not i.closing]
        self._free_launches = free_launches

    def orders(self, decision: Decision) -> Iterator[Order]:
        spare: list[Instance] = []
        for target in decision.pools:
            pool = [i for i in self._serving if i.target_s == target.target_s]
            pool.sort(key=_by_usefulness, reverse=True)
            spare += pool[target.total :]
            del pool[target.total :]
            yield from self._split(pool, target)
        for target in decision.pools:
            have = sum(i.target_s == target.target_s for i in self._serving)
            for _ in range(target.total - have):
                yield from self._grow_pool(target.target_s, spare)
        yield from self._balance_batch(decision, spare)

    def _split(self, pool: list[Instance], target: PoolTarget) -> Iterator[Order]:
        """The fullest are interactive-only, as few roles as possible changing."""
        ready = [i for i in pool if i.state is InstanceState.READY]
        surplus = sum(i.role is Role.INTERACTIVE for i in ready) - target.interactive
        changing = [i for i in ready if (i.role is Role.INTERACTIVE) == (surplus > 0)]
        changing.sort(key=lambda i: (i.load, i.instance_id), reverse=surplus < 0)
        role = Role.MIXED if surplus > 0 else Role.INTERACTIVE
        for instance in changing[: abs(surplus)]:
            yield Order(SET_ROLE, instance, role, target.target_s)

    def _grow_pool(self, target_s: float, spare: list[Instance]) -> Iterator[Order]:
        """One more mixed instance, from wherever it costs least."""
        for source in (spare, self._closing, self._batch):
            free = [i for i in source if not i.interactive or i.target_s == target_s]
            if not free:
                continue
            instance = max(free, key=_by_readiness)
            source.remove(instance)
            if instance.closing:
                yield Order(OPEN, instance)
            if instance.role is not Role.MIXED or instance.target_s != target_s:
                yield Order(SET_ROLE, instance, Role.MIXED, target_s)
            return
        if self._free_launches > 0:
            self._free_launches -= 1
            yield Order(LAUNCH, None, Role.MIXED, target_s)

    def _balance_batch(self, decision: Decision, spare: list[Instance]) -> Iterator[Order]:
        target_s = decision.pools[-1].target_s
        lacking = decision.batch - len(self._batch)
        for source in (spare, self._closing):
            # Interactive requests that are inside end there; no more come.
            for instance in sorted(source, key=_by_usefulness)[: max(0, lacking)]:
                source.remove(instance)
                lacking -= 1
                if instance.closing:
                    yield Order(OPEN, instance)
                if instance.role is not Role.BATCH:
                    yield Order(SET_ROLE, instance, Role.BATCH, target_s)
        for _ in range(min(max(0, lacking), self._free_launches)):
            yield Order(LAUNCH, None, Role.BATCH, target_s)
        self._batch.sort(key=_by_usefulness)
        for instance in [*spare, *self._batch[: max(0, -lacking)]]:
            yield Order(CLOSE, instance)


def _by_usefulness(instance: Instance) -> tuple[bool, float, float, int]:
    """Retired first: what still loads, then the least interactive load, then the least batch."""
    is_ready = instance.state is InstanceState.READY
    return is_ready, instance.load, instance.batch_kv, -instance.instance_id


def _by_readiness(instance: Instance) -> tuple[bool, float, int]:
    """Taken over first: what is ready, with the least batch work to evict."""
    return instance.state is InstanceState.READY, -instance.batch_kv, -instance.instance_id
