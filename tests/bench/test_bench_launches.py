"""The script that times the host's side of launches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_two_checkouts_are_timed_in_one_run() -> None:
    command = [sys.executable, "scripts/bench_launches.py", "--rounds", "1", "--beside", str(ROOT)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) == {"microseconds", "beside", "ratio"}
    kernels = {"decode_attention", "rope_kv_write", "add_rms_norm", "gated_activation"}
    for figures in report.values():
        assert set(figures) == kernels
        assert all(figure > 0 for figure in figures.values())
