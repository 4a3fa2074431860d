"""The wait policy of compute threads is set before torch reads it, and never over the user's own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CALL = "from chiron_engine.runtime.openmp import let_waiting_threads_sleep as f; import os; "
SHOW = "print(f(), os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.parametrize(
    ("code", "setting", "expected"),
    [
        (CALL + SHOW, None, "True PASSIVE"),
        (CALL + SHOW, "active", "False active"),
        (CALL + SHOW, "passive", "True passive"),
        ("import sys; sys.modules['torch'] = sys; " + CALL + SHOW, None, "False None"),
    ],
)
def test_wait_policy(code: str, setting: str | None, expected: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if setting is not None:
        environment["OMP_WAIT_POLICY"] = setting
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
