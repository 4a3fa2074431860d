"""Settings that torch reads from the environment while it is loaded. Imports no torch."""

from __future__ import annotations

import os

SETTINGS = {
    # How long an OpenMP thread spins for its next piece of work before it sleeps: some 100 us, which
    # spans the gaps inside a step. A thread that spins keeps its core from the thread it waits for
    # as soon as anything else runs on the machine: another engine, the gateway, a test. The default
    # of milliseconds gains nothing on idle cores and makes steps many times slower on busy ones; not
    # spinning at all costs a third of the throughput on idle ones.
    "GOMP_SPINCOUNT": "30000",
    # Large pages for large tensors: weights are streamed through once a step.
    "THP_MEM_ALLOC_ENABLE": "1",
}


def prepare_environment() -> None:
    """Call before torch is imported. Settings of the user's stand."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
