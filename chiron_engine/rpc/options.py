"""gRPC channel and server options: limits and keepalives.

A peer that is stopped (SIGSTOP, a dead host) keeps its socket open; only keepalive pings notice.
`http2.ping_timeout_ms` defaults to 60 s, so without it the other two values mean little. Pings
every 2 s with 5 s of patience let a pause under 4 s pass and end a call to a dead peer in 7 s.
Servers must allow such pings, or they answer GOAWAY "too many pings" after three.
"""

from __future__ import annotations

ChannelOption = tuple[str, int]

MAX_MESSAGE_BYTES = 16 << 20
MAX_METADATA_BYTES = 64 << 10
MAX_CONCURRENT_RPCS = 4096
MAX_PENDING_RPCS = 1 << 16


def channel_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[ChannelOption]:
    """Client side. Answers may be larger than requests: nothing bounds a model's output text."""
    return [
        ("grpc.keepalive_time_ms", 2000),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.http2.ping_timeout_ms", 5000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ]


def server_options(
    max_message_bytes: int = MAX_MESSAGE_BYTES, *, shares_port: bool = False
) -> list[ChannelOption]:
    """Server side. `so_reuseport`: with the default 1, two servers share a port silently. Of calls
    that come faster than Python takes them gRPC drops some, from 1000 on, with CANCELLED and no word;
    they are to get as far as our own limits, which say why."""
    return [
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.keepalive_time_ms", 2000),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.http2.ping_timeout_ms", 5000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.server.max_pending_requests", MAX_PENDING_RPCS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_RPCS),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ]
