"""What this host has for engines, one `name=value` a line; used by launch_cluster.sh before it starts any.

probe.py CPU|GPU [PORT]
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

import chiron_engine
from chiron_engine.cluster.gpus import usable_gpus
from chiron_engine.rpc.port import BindError, check_free


def digest_of_code() -> str:
    """Two checkouts may have one version and differ."""
    package = Path(chiron_engine.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    wanted, *ports = sys.argv[1:]
    print(f"version={chiron_engine.__version__} (code {digest_of_code()})")
    print(f"python={platform.python_version()}")
    print(f"cores={len(os.sched_getaffinity(0))}")
    print(f"gpus={' '.join(usable_gpus()) if wanted == 'GPU' else ''}")
    for port in ports:
        try:
            check_free("0.0.0.0", int(port))
        except BindError as error:
            print(f"trouble={error}")


main()
