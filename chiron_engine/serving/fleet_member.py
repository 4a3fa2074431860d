"""An engine as part of a fleet: joined to its coordinator, giving batch work back when told to."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from chiron_engine import __version__
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.policy.iteration.autoscaler_inputs import ItlTargets
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.rpc.v1 import coordinator_pb2

from .coordinator_link import ORPHAN_S, CoordinatorLink, Orders
from .engine_loop import EngineLoop
from .telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Join:
    """coordinator: its address. advertised_host: where gateways reach this engine. instance_id: given
    by whoever launched this process, None for one started by hand. orphan_s: seconds without a
    coordinator after which the engine ends."""

    coordinator: str
    instance_id: int | None = None
    advertised_host: str = "127.0.0.1"
    orphan_s: float = ORPHAN_S


class EngineRefused(RuntimeError):
    """The coordinator does not take this engine, or there is none; the message is the reason."""


class FleetMember:
    """Evicted batch requests leave an engine that is in a fleet.

    joined: called, on a thread of the link, whenever a coordinator has taken the engine in.
    end(error): called there when the engine is to drain and end: with what went wrong, or None where
    the coordinator asked for it, or has gone for good.
    """

    def __init__(
        self,
        join: Join,
        core: EngineCore,
        loop: EngineLoop,
        boot_id: str,
        model: str,
        costs: StepCosts,
        port: int,
        joined: Callable[[], None],
        end: Callable[[Exception | None], None],
    ) -> None:
        core.hand_back_evicted = True
        self._loop = loop
        self._joined = joined
        self._end = end
        self._has_joined = False
        host = join.advertised_host
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        register = _register(core, boot_id, model, costs, address)
        if join.instance_id is not None:
            register.instance_id = join.instance_id
        orders = Orders(
            joined=self._note_joined,
            set_targets=self._set_targets,
            drain=lambda: end(None),
            refused=lambda reason: end(EngineRefused(f"the coordinator refused this engine: {reason}")),
            orphaned=lambda reason: end(None if self._has_joined else EngineRefused(reason)),
        )
        snapshot = Telemetry(core, loop, boot_id).snapshot
        self._link = CoordinatorLink(join.coordinator, register, snapshot, orders, join.orphan_s)

    def start(self) -> None:
        self._link.start()

    def leave(self) -> None:
        """Give batch requests back, for others to run; the interactive ones end here."""
        self._loop.give_back_batch()

    def close(self) -> None:
        """Say goodbye, which may take a moment."""
        self._link.close()

    def _note_joined(self) -> None:
        self._has_joined = True
        self._joined()

    def _set_targets(self, targets: coordinator_pb2.SetTargets) -> None:
        self._loop.set_targets(ItlTargets(targets.interactive_itl_s, targets.batch_itl_s))


def _register(
    core: EngineCore, boot_id: str, model: str, costs: StepCosts, address: str
) -> coordinator_pb2.Register:
    shape = core.shape
    return coordinator_pb2.Register(
        boot_id=boot_id,
        version=__version__,
        model=model,
        address=address,
        host=socket.gethostname(),
        pid=os.getpid(),
        block_size=shape.block_size,
        kv_capacity_tokens=shape.num_device_blocks * shape.block_size,
        max_slots=shape.max_slots,
        max_model_len=min(shape.max_model_len, shape.num_device_blocks * shape.block_size),
        max_step_tokens=shape.max_step_tokens,
        devices=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        costs=coordinator_pb2.StepCosts(
            base_s=costs.base_s,
            per_request_s=costs.per_request_s,
            per_kv_token_s=costs.per_kv_token_s,
            per_prompt_token_s=costs.per_prompt_token_s,
            per_prompt_context_s=costs.per_prompt_context_s,
        ),
    )
