"""`chiron ps`: the engines of a running fleet, and what scales it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .coordinator_call import DEFAULT_SERVER, AsJson, Server, call

if TYPE_CHECKING:
    from google.protobuf.message import Message


def ps(server: Server = DEFAULT_SERVER, as_json: AsJson = False) -> None:
    """Show the engines of a fleet, and the quantities that scale it."""
    from .fleet_table import summary, table

    fleet = call(server, lambda client: client.fleet())
    if as_json:
        print(json.dumps(as_plain(fleet), indent=2))
        return
    print("\n".join([*table(fleet), *summary(fleet)]))


def as_plain(message: Message) -> dict[str, Any]:
    """Every field by its name on the wire, also those at their default; None for a message that is not
    there."""
    from google.protobuf.message import Message

    plain: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is None:
            plain[field.name] = value
        elif isinstance(value, Message):
            plain[field.name] = as_plain(value) if message.HasField(field.name) else None
        else:
            plain[field.name] = [as_plain(item) for item in value]
    return plain
