"""A step plan in short: equal digests mean equal plans."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any
from zlib import crc32

from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.plan import NO_DECODES, DecodeBatch, StepPlan


class PlanDigests:
    """Of the plans of one engine, in their order. What a step changes is told in full, but for blocks
    and the decoding requests, which are told by number and checksum; those are computed when they
    change."""

    def __init__(self) -> None:
        self._decode: DecodeBatch = NO_DECODES
        self._of_decode = [0, 0]

    def of(self, plan: StepPlan, limits: Limits) -> dict[str, Any]:
        """Of plain lists and numbers. limits: those it was made under."""
        digest: dict[str, Any] = {
            "step": plan.step,
            "limits": [limits.max_running, limits.token_budget, limits.shrink],
            "decode": self._decoding(plan.decode),
        }
        if plan.left:
            digest["left"] = list(plan.left)
        if plan.joined:
            digest["joined"] = [
                [j.slot, j.request.request_id, j.num_computed, len(j.blocks), checksum(j.blocks)]
                for j in plan.joined
            ]
        if plan.chunks:
            digest["chunks"] = [[c.slot, c.start, c.count, c.samples] for c in plan.chunks]
        if plan.drafts:
            digest["drafts"] = [[d.slot, d.start, list(d.tokens)] for d in plan.drafts]
        if plan.preempted:
            digest["preempted"] = [request.request_id for request in plan.preempted]
        if plan.final:
            digest["final"] = [request.request_id for request in plan.final]
        if plan.grown:
            grown = checksum(n for g in plan.grown for n in (g.slot, g.index, g.block))
            digest["grown"] = [len(plan.grown), grown]
        for name, copies in (("copies_out", plan.copies_out), ("copies_in", plan.copies_in)):
            if copies:
                digest[name] = [len(copies), checksum(n for c in copies for n in (c.device, c.host))]
        return digest

    def _decoding(self, decode: DecodeBatch) -> list[int]:
        """A batch that changes is another object."""
        if decode is not self._decode:
            self._decode = decode
            ids = checksum(request.request_id for request in decode.requests)
            self._of_decode = [len(decode.slots), checksum((*decode.slots, ids))]
        return self._of_decode


def checksum(numbers: Iterable[int]) -> int:
    return crc32(array("q", numbers).tobytes())
