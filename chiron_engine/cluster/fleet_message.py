"""The fleet as operators see it, on the wire."""

from __future__ import annotations

from chiron_engine.policy.fleet.fleet_state import FleetState
from chiron_engine.policy.fleet.messages import FleetGauges, InstanceState
from chiron_engine.policy.fleet.scaling import FAILED_PAUSE_S
from chiron_engine.rpc.v1 import coordinator_pb2

from .coordinator import Coordinator
from .engines import Engine


def fleet_message(coordinator: Coordinator) -> coordinator_pb2.Fleet:
    now = coordinator.clock()
    hello = coordinator.hello
    message = coordinator_pb2.Fleet(
        model=hello.model if hello is not None else "",
        uptime_s=now - coordinator.started_at,
        instances=[_instance(coordinator, engine, now) for engine in coordinator.roster.engines.values()],
        max_devices=coordinator.config.max_gpus,
        min_instances=coordinator.config.min_instances,
        trouble=coordinator.roster.trouble,
        batch_itl_s=coordinator.config.batch_itl_s,
    )
    if coordinator.fleet is None:
        return message
    gauges = coordinator.fleet.gauges(now)
    message.busy = gauges.busy
    message.theta = gauges.theta
    message.interactive_backpressure = gauges.interactive_backpressure
    message.batch_backpressure = gauges.batch_backpressure
    message.target = gauges.target
    message.batch_target = gauges.batch_target
    message.held_interactive = gauges.held_interactive
    message.queued_batch = gauges.queued_batch
    message.failed_launches = coordinator.fleet.scaling.failed_launches
    message.trouble = _trouble(coordinator, coordinator.fleet, gauges)
    return message


def _trouble(coordinator: Coordinator, fleet: FleetState, gauges: FleetGauges) -> str:
    """Why there are fewer engines than the load asks for."""
    cause = coordinator.roster.trouble
    wanted, most = gauges.target + gauges.batch_target, coordinator.config.max_gpus // fleet.model.spec.gpus
    if not coordinator.roster.can_launch:
        short = f"the load asks for {wanted} engines and {most} have joined" if wanted > most else ""
        return cause or short
    if fleet.scaling.has_given_up:
        return (
            f"FAILED: {fleet.scaling.failed_launches} launches in a row failed, the last with: {cause}. One "
            f"is tried every {FAILED_PAUSE_S / 60:.0f} minutes; `chiron scale` tries again now"
        )
    if not cause and wanted > most:
        return f"the load asks for {wanted} engines; at most {most} may run (`chiron scale --max`)"
    return cause


def _instance(coordinator: Coordinator, engine: Engine, now: float) -> coordinator_pb2.Instance:
    register, role, fleet = engine.register, engine.role, coordinator.fleet
    message = coordinator_pb2.Instance(
        instance_id=engine.instance_id,
        state=_state(coordinator, engine),
        age_s=now - engine.launched_at,
        telemetry=engine.telemetry,
    )
    if role is not None:
        message.role = role.role.value
        message.itl_target_s = role.itl_target_s
    if register is not None:
        message.address, message.host, message.pid = register.address, register.host, register.pid
        message.devices, message.boot_id = register.devices, register.boot_id
        message.silent_s = now - engine.heard_at
    known = fleet.instances.by_id.get(engine.instance_id) if fleet is not None else None
    if known is not None:
        message.load = known.load
    return message


def _state(coordinator: Coordinator, engine: Engine) -> str:
    if engine.is_draining:
        return InstanceState.DRAINING.value
    if not engine.is_ready:
        return InstanceState.LOADING.value
    fleet = coordinator.fleet
    known = fleet.instances.by_id.get(engine.instance_id) if fleet is not None else None
    return "closing" if known is not None and known.closing else InstanceState.READY.value
