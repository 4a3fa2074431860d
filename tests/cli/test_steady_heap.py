"""What is there when a process begins to serve is left out of later garbage collections."""

from __future__ import annotations

import subprocess
import sys

READY = """
import gc
from chiron_engine.commands.steady_heap import freeze_heap
before = len(gc.get_objects())
freeze_heap()
assert gc.get_freeze_count() > before / 2 > 1000, (gc.get_freeze_count(), before)
assert len(gc.get_objects()) < before / 10
"""


def test_the_heap_of_a_ready_process_is_frozen() -> None:
    subprocess.run([sys.executable, "-c", READY], check=True, timeout=60)


LOADING = """
import gc
from chiron_engine.commands.steady_heap import loading_heap
try:
    with loading_heap():
        assert not gc.isenabled()
        loaded = [[] for _ in range(5000)]
        raise ValueError
except ValueError:
    assert gc.isenabled()
assert gc.get_freeze_count() > 5000
"""


def test_what_was_loaded_is_frozen_and_collections_go_on_though_loading_failed() -> None:
    subprocess.run([sys.executable, "-c", LOADING], check=True, timeout=60)
