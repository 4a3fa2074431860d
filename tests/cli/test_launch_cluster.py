"""scripts/launch_cluster.sh on two hosts that are this one, reached by a `ssh` or `srun` of our own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.chiron_process import is_alive, wait_gone
from tests.cli.fleet_process import SIMULATED, ask_fleet, free_port, generate, wait_until

SCRIPT = Path(__file__).parents[2] / "scripts" / "launch_cluster.sh"
HOSTS = ["127.0.0.2", "127.0.0.3"]

FAKE_SSH = """#!/bin/bash
while [ "${1#-}" != "$1" ]; do case $1 in -o) shift 2 ;; *) shift ;; esac; done
case $1 in 127.0.0.[23]) ;; *) echo "ssh: Could not resolve hostname $1" >&2; exit 255 ;; esac
if [ "$1" = "$OTHER_VERSION" ]; then bash -c "$2" | sed 's/version=.*/version=9.9/'; exit; fi
exec bash -c "$2"
"""
FAKE_SRUN = """#!/bin/bash
[[ " $* " = *" --jobid=7 "*" --nodelist=127.0.0."[23]" "* ]] || exit 9
exec bash -c "${@: -1}"
"""
FAKE_SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames 127.0.0.[2-3]" ] && printf '127.0.0.2\\n127.0.0.3\\n'
"""


class Cluster:
    """The script, running."""

    def __init__(self, folder: Path, arguments: Sequence[str], environment: dict[str, str]) -> None:
        for name, text in {"ssh": FAKE_SSH, "srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.logs = folder / "logs"
        self.out, self.err = folder / "out", folder / "err"
        variables = {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "OTHER_VERSION": "",
            **environment,
        }
        own = ["--python", sys.executable, "--logs", str(self.logs)]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [str(SCRIPT), *arguments, *own, "--", *SIMULATED],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=variables,
                # What starts the tests may have ignored it, and bash could not change that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    def pids(self) -> dict[str, int]:
        """By the names of the logs."""
        logs = {path.stem: path.read_text() for path in self.logs.glob("*.log")}
        return {name: int(text.split()[1]) for name, text in logs.items() if text.startswith("pid ")}

    def wait_ready(self) -> None:
        end = time.monotonic() + 60
        while "ready; try:" not in self.stderr:
            assert self.process.poll() is None and time.monotonic() < end, self.stderr
            time.sleep(0.1)
        wait_until(lambda: self.out.read_text().endswith("\n"))


@contextmanager
def cluster(
    folder: Path, hosts: str, *more: str, environment: dict[str, str] | None = None
) -> Iterator[Cluster]:
    cluster = Cluster(folder, [hosts, "tiny", *more], environment or {})
    try:
        yield cluster
    finally:
        if cluster.process.poll() is None:
            cluster.process.terminate()
            cluster.process.wait(90)


def test_two_hosts_serve_until_ctrl_c(tmp_path: Path) -> None:
    port = free_port()
    state = f"--state-dir {tmp_path / 'state'}"
    options = ["--port", str(port), "--engines-per-host", "2", "--coordinator", state]
    with cluster(tmp_path, ",".join(HOSTS), *options) as running:
        running.wait_ready()
        assert f"127.0.0.2:{port}" in running.out.read_text()
        wait_until(lambda: len(ask_fleet(port).instances) == 4)
        assert len(generate(port, host="127.0.0.2")) == 20
        pids = running.pids()
        assert set(pids) == {"coordinator", *(f"engine-{host}-{n}" for host in HOSTS for n in (1, 2))}
        os.kill(pids["engine-127.0.0.3-2"], signal.SIGKILL)
        wait_until(lambda: "engine-127.0.0.3-2 has ended" in running.stderr)
        assert len(generate(port)) == 20
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(60) == 130
        assert wait_gone(list(pids.values()))


def test_in_an_allocation_the_end_of_the_coordinator_ends_all(tmp_path: Path) -> None:
    port = free_port()
    state = f"--state-dir {tmp_path / 'state'}"
    options = ["--port", str(port), "--engines-per-host", "1", "--coordinator", state]
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "127.0.0.[2-3]"}
    with cluster(tmp_path, "slurm", *options, environment=slurm) as running:
        running.wait_ready()
        pids = running.pids()
        assert len(pids) == 3
        assert all(map(is_alive, pids.values()))
        os.kill(pids["coordinator"], signal.SIGKILL)
        assert running.process.wait(60) == 1
        assert "the coordinator has ended" in running.stderr
        assert wait_gone(list(pids.values()))


@pytest.mark.parametrize(
    ("hosts", "more", "environment", "words"),
    [
        (
            "127.0.0.2,127.0.0.3",
            [],
            {"OTHER_VERSION": "127.0.0.3"},
            r"127.0.0.3: has version 9.9; 127.0.0.2 has",
        ),
        ("127.0.0.2,elsewhere", [], {}, r"elsewhere: the check failed: ssh: Could not resolve"),
        ("127.0.0.2,127.0.0.2", [], {}, r"127.0.0.2 is named twice"),
        ("127.0.0.2", ["--timeout", "soon"], {}, r"soon is no number"),
        ("slurm", [], {}, r"no Slurm allocation"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    hosts: str, more: list[str], environment: dict[str, str], words: str, tmp_path: Path
) -> None:
    options = ["--port", str(free_port()), "--engines-per-host", "1", *more]
    with cluster(tmp_path, hosts, *options, environment=environment) as running:
        assert running.process.wait(60) == 1
        assert re.search(words, running.stderr), running.stderr
        assert running.pids() == {}
        assert running.out.read_text() == ""


def test_a_port_in_use_and_a_missing_gpu_are_both_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with cluster(tmp_path, "127.0.0.2", "--port", str(port)) as running:
            assert running.process.wait(60) == 1
            assert f"port {port}" in running.stderr
            assert f"process {os.getpid()}" in running.stderr
            assert "127.0.0.2: has no usable GPU" in running.stderr
