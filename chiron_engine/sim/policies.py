"""The policies of `chiron simulate` that go by a name alone: a local autoscaler on every engine and a
fleet policy, both of the paper, or both ours. (`clairvoyant` takes the lower bound's schedule as well.)
"""

from __future__ import annotations

from chiron_engine.policy.fleet.autoscalers import make_global_autoscaler
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.fleet_state import FleetState
from chiron_engine.policy.fleet.messages import InstanceSpec
from chiron_engine.policy.iteration.local_autoscaler import LOCAL_AUTOSCALERS

from .sim_policy import SimPolicy

__all__ = ["POLICIES", "SimPolicy", "make_policy"]

POLICIES = ("chiron", "paper", "paper-literal", "static:N")
_STATIC = "static:"
_LOCAL_AUTOSCALERS = {"chiron": "adaptive", "paper": "paper", "paper-literal": "paper-literal"}


def make_policy(name: str, local_autoscaler: str | None = None) -> SimPolicy:
    """The policy of that name, perhaps with another local autoscaler; a static fleet has ours. Raises
    ValueError for a name that does not exist, and says which do."""
    static = _static_instances(name)
    if static is None and name not in _LOCAL_AUTOSCALERS:
        raise ValueError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}, N being a number")
    local = local_autoscaler or _LOCAL_AUTOSCALERS.get(name, "adaptive")
    if local not in LOCAL_AUTOSCALERS:
        raise ValueError(
            f"there is no local autoscaler {local!r}; there are {', '.join(sorted(LOCAL_AUTOSCALERS))}"
        )

    def make_fleet(spec: InstanceSpec, config: FleetConfig) -> FleetState:
        return FleetState(spec, config, make_global_autoscaler(name, config, spec))

    return SimPolicy(name, local, make_fleet, static)


def _static_instances(name: str) -> int | None:
    """N of `static:N`; None for other names."""
    count = name.removeprefix(_STATIC)
    return int(count) if name.startswith(_STATIC) and count.isascii() and count.isdigit() else None
