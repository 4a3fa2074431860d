"""How the compute threads of torch wait for each other on the CPU. Imports no torch."""

from __future__ import annotations

import os
import sys

SETTING = "OMP_WAIT_POLICY"


def let_waiting_threads_sleep() -> bool:
    """Have OpenMP's threads sleep instead of spinning between parallel regions. Call before torch is
    imported, which is when the setting is read; returns whether it is in effect. A setting of the
    user's stands.

    A thread that spins keeps its core from the thread it waits for as soon as anything else runs
    on the machine: another engine, the gateway, a test. With two busy processes beside it on two
    cores, a decode step of 30 layers took over ten times as long with spinning threads.
    """
    if "torch" in sys.modules:
        return os.environ.get(SETTING, "").upper() == "PASSIVE"
    return os.environ.setdefault(SETTING, "PASSIVE").upper() == "PASSIVE"
