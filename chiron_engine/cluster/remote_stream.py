"""A request whose tokens arrive at a gateway of another process: what the coordinator knows of it."""

from __future__ import annotations

from array import array
from typing import Protocol

from chiron_engine.rpc.errors import RpcFailure
from chiron_engine.rpc.token_stream import TokenStream, TokenTimes
from chiron_engine.rpc.v1 import engine_pb2, routing_pb2

from .fleet_requests import AskedRequest


class RemoteOwner(Protocol):
    """The line to its gateway."""

    def place(self, stream: RemoteStream, instance_id: int) -> None: ...

    def move(self, stream: RemoteStream) -> None: ...

    def refuse(self, stream: RemoteStream, failure: RpcFailure) -> None: ...


class RemoteStream:
    """Has the names of `TokenStream` where the two agree. attempt: number of its last placement, so that
    what is said of one before is known as such. output_tokens: as last heard. times: once it has ended,
    on the coordinator's clock."""

    __slots__ = (
        "_owner",
        "attempt",
        "failure",
        "finished",
        "gave_way",
        "id",
        "key",
        "output_tokens",
        "prompt_tokens",
        "received",
        "times",
    )

    def __init__(self, id: int, asked: AskedRequest, received: float, owner: RemoteOwner) -> None:
        """id: its name on the line of `owner`. received: by the gateway, on the coordinator's clock."""
        self.id = id
        self.received = received
        self.prompt_tokens = asked.prompt_tokens
        self.key = 0
        self.gave_way = 0
        self.attempt = 0
        self.output_tokens = asked.produced
        self.times = TokenTimes()
        self.finished: engine_pb2.Finished | None = None
        self.failure: RpcFailure | None = None
        self._owner = owner

    @property
    def has_ended(self) -> bool:
        return self.finished is not None or self.failure is not None

    def place(self, instance_id: int) -> None:
        self.attempt += 1
        self._owner.place(self, instance_id)

    def move(self) -> None:
        """End the attempt under way: the request goes on elsewhere."""
        self._owner.move(self)

    def fail(self, failure: RpcFailure) -> None:
        """It will not run; its gateway is told why."""
        self.failure = failure
        self._owner.refuse(self, failure)

    def end(self, ending: routing_pb2.Ending, failure: RpcFailure) -> None:
        """failure: where it has not finished."""
        self.output_tokens = ending.output_tokens
        self.times = TokenTimes(
            self.received + ending.first_token_s,
            self.received + ending.last_token_s,
            ending.output_tokens,
            array("f", ending.gaps_s),
        )
        if ending.HasField("reason"):
            self.finished = engine_pb2.Finished(reason=ending.reason)
        else:
            self.failure = failure


RoutedStream = TokenStream | RemoteStream
"""A request that the coordinator routes, wherever its tokens arrive."""
