"""How the compute threads of torch wait for each other on the CPU. Imports no torch."""

from __future__ import annotations

import os

SETTING = "GOMP_SPINCOUNT"
# Some 100 us, which spans the gaps inside a step.
SPINS = "30000"


def bound_spinning() -> None:
    """Let OpenMP's threads spin only briefly for their next piece of work before they sleep. Call
    before torch is imported, which is when the setting is read. A setting of the user's stands.

    A thread that spins keeps its core from the thread it waits for as soon as anything else runs
    on the machine: another engine, the gateway, a test. The default of milliseconds gains nothing
    on idle cores and makes steps many times slower on busy ones; not spinning at all costs a third
    of the throughput on idle ones.
    """
    os.environ.setdefault(SETTING, SPINS)
