"""Whether what an engine says of itself can be true; the coordinator plans with it."""

from __future__ import annotations

import math
import re

from chiron_engine.policy.fleet.messages import InstanceSpec
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.rpc.errors import RpcFailure, invalid_argument
from chiron_engine.rpc.v1 import coordinator_pb2

COUNTS = ("kv_capacity_tokens", "max_slots", "max_model_len")
COSTS = tuple(field.name for field in coordinator_pb2.StepCosts.DESCRIPTOR.fields)
ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[\w.-]+):([0-9]{1,5})")
MAX_PORT = (1 << 16) - 1


def check_register(register: coordinator_pb2.Register) -> None:
    """Raises RpcFailure for what no engine can be."""
    if not register.boot_id:
        raise _wrong("boot_id is empty; it must differ with every start of an engine")
    _check_address(register.address)
    for name in COUNTS:
        if getattr(register, name) == 0:
            raise _wrong(f"{name} is 0; it must be at least 1")
    for name in COSTS:
        value = getattr(register.costs, name)
        if not (math.isfinite(value) and value >= 0.0):
            raise _wrong(f"costs.{name} is {value}; it must be finite and not negative")
    if register.costs.base_s == 0.0:
        raise _wrong("costs.base_s is 0; it must be the seconds that a step takes at least")


def instance_spec(register: coordinator_pb2.Register, load_s: float) -> InstanceSpec:
    """What an instance like this one can do. load_s: seconds until it could."""
    costs = register.costs
    return InstanceSpec(
        costs=StepCosts(
            costs.base_s,
            costs.per_request_s,
            costs.per_kv_token_s,
            costs.per_prompt_token_s,
            costs.per_prompt_context_s,
        ),
        kv_capacity_tokens=register.kv_capacity_tokens,
        max_slots=register.max_slots,
        max_model_len=register.max_model_len,
        load_s=load_s,
    )


def _check_address(address: str) -> None:
    match = ADDRESS.fullmatch(address)
    if match is None or not 1 <= int(match[2]) <= MAX_PORT:
        raise _wrong(f"address is {address[:80]!a}; it must be host:port")


def _wrong(reason: str) -> RpcFailure:
    return invalid_argument(reason, "engine_refused")
