"""`chiron drain` and `chiron retire`: an engine of a running fleet is to go."""

from __future__ import annotations

from .console import note
from .coordinator_call import DEFAULT_SERVER, InstanceId, Server, call


def drain(instance_id: InstanceId, server: Server = DEFAULT_SERVER) -> None:
    """Close an engine: it gets no more requests, interactive ones end there, batch ones move, and its
    process exits. Returns at once; `ps` shows how far it is."""
    is_here = call(server, lambda client: client.drain(instance_id))
    note(f"engine {instance_id} is draining" if is_here else f"engine {instance_id} has ended already")


def retire(instance_id: InstanceId, server: Server = DEFAULT_SERVER) -> None:
    """Like drain, but at once: interactive requests, too, go on at other engines with the tokens they
    have."""
    is_here = call(server, lambda client: client.retire(instance_id))
    note(f"engine {instance_id} is retiring" if is_here else f"engine {instance_id} has ended already")
