"""What may be asked of a fleet that runs: other bounds of its size, and a decision within them."""

from __future__ import annotations

from dataclasses import replace

from .autoscalers import make_global_autoscaler
from .config import FleetConfig
from .fleet_view import Decision, PoolTarget
from .messages import InstanceSpec


def resized(
    config: FleetConfig,
    policy: str,
    spec: InstanceSpec,
    *,
    min_instances: int | None = None,
    max_gpus: int | None = None,
    most_gpus: int | None = None,
) -> FleetConfig:
    """The configuration with other bounds; None leaves one as it is. most_gpus: devices there are,
    None where nothing bounds them.

    Raises ValueError for bounds that contradict each other, the devices or the policy.
    """
    least = config.min_instances if min_instances is None else min_instances
    most = config.max_gpus if max_gpus is None else max_gpus
    if most_gpus is not None and most > most_gpus:
        raise ValueError(f"max_gpus is {most}; there are {most_gpus} devices")
    if least * spec.gpus > most:
        raise ValueError(f"min_instances is {least} and max_gpus {most}; the first must fit into the second")
    if policy.startswith("static:") and min_instances is not None:
        raise ValueError(f"min_instances is {least}; the policy {policy} keeps its number at any load")
    new = replace(config, min_instances=least, max_gpus=most)
    make_global_autoscaler(policy, new, spec)
    return new


def capped(decision: Decision, most: int) -> Decision:
    """The decision with at most so many instances: batch ones go first, then those of the loosest ITL
    target, since tighter ones serve every request."""
    pools, left = [], most
    for pool in decision.pools:
        total = min(pool.total, left)
        interactive = min(pool.interactive, total)
        pools.append(PoolTarget(pool.target_s, interactive, total - interactive))
        left -= total
    return replace(decision, pools=tuple(pools), batch=min(decision.batch, left))
