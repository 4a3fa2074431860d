"""A child process that reports like an engine. First argument: how it behaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from chiron_engine.cluster.engine_report import EngineFailed, EngineReady, LoadPhase, Report, encode
from chiron_engine.cluster.parent_death import die_with_parent


def say(report: Report) -> None:
    print(encode(report), flush=True)


def main() -> None:
    behaviour = sys.argv[1]
    die_with_parent(int(sys.argv[sys.argv.index("--parent-pid") + 1]))
    say(LoadPhase("load weights", 0.5))
    print("a line for people")
    print("x" * 200_000, file=sys.stderr, flush=True)
    if behaviour == "fail":
        say(EngineFailed(3, "no such model"))
        sys.exit(3)
    if behaviour == "silent-exit":
        sys.exit(7)
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "with-child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(f"child {child.pid}", flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    path = f"threads={os.environ['OMP_NUM_THREADS']}"
    if behaviour == "gpu":
        path = f"gpu={os.environ['CUDA_VISIBLE_DEVICES']}"
    say(EngineReady("127.0.0.1:1", os.getpid(), path))
    time.sleep(60)


main()
