"""Binding a server to a port, with an error that says who holds it."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

LISTEN = "0A"  # the state column of /proc/net/tcp


class BindError(RuntimeError):
    """The address cannot be listened on; the message says why."""


class PortInUse(BindError):
    """Another socket listens on the port. `holder` is None where the system does not tell."""

    def __init__(self, host: str, port: int, holder: Holder | None) -> None:
        self.host, self.port, self.holder = host, port, holder
        who = f"process {holder.pid} ({holder.command})" if holder else "a process of another user"
        super().__init__(f"port {port} on {host} is in use by {who}; stop it or choose another port")


@dataclass(frozen=True, slots=True)
class Holder:
    pid: int
    command: str


def bind(server: grpc.aio.Server, host: str, port: int, *, shares_port: bool = False) -> int:
    """Bind `server` and return the port (chosen by the system where `port` is 0). shares_port: with other
    processes that say so too, as the server's options have it.

    Raises PortInUse, or BindError for a port out of range, an unknown host or a missing right.
    """
    if not 0 <= port <= 65535:
        raise BindError(f"port is {port}; it must be between 0 (any free port) and 65535")
    if not shares_port:
        check_free(host, port)
    try:
        return server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError:
        check_free(host, port)  # taken in between: name the holder
        raise BindError(f"cannot listen on {host} port {port}") from None


def check_free(host: str, port: int) -> None:
    """Raise PortInUse or BindError where a listening socket on (host, port) cannot be opened.

    Done with a plain socket first because grpc's own error carries no cause and logs to stderr.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise BindError(f"unknown host {host!r}: {error.strerror}") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(host, port, find_holder(port)) from None
            raise BindError(f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}") from None


def find_holder(port: int) -> Holder | None:
    """The process that listens on `port`, or None where it is not ours to see. Linux only."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    links = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _holds(process, links):
            return Holder(int(process.name), _command(process))
    return None


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            columns = row.split()
            if columns[3] == LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(columns[9])
    return inodes


def _holds(process: Path, links: set[str]) -> bool:
    try:
        descriptors = list(os.scandir(process / "fd"))
    except OSError:  # it ended, or belongs to another user
        return False
    return any(_target(entry.path) in links for entry in descriptors)


def _target(link: str) -> str | None:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return None


def _command(process: Path) -> str:
    try:
        raw = (process / "cmdline").read_bytes()
    except OSError:
        return "ended"
    text = raw.replace(b"\0", b" ").decode(errors="replace").strip()
    return text if len(text) <= 200 else text[:197] + "..."
