"""What is there when a process begins to serve is left out of later garbage collections."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import gc
from chiron_engine.commands.steady_heap import freeze_heap
before = len(gc.get_objects())
freeze_heap()
assert gc.get_freeze_count() > before / 2 > 1000, (gc.get_freeze_count(), before)
assert len(gc.get_objects()) < before / 10
"""


def test_the_heap_of_a_ready_process_is_frozen() -> None:
    subprocess.run([sys.executable, "-c", CHECK], check=True, timeout=60)
