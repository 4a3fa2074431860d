"""Shared by all tests: child processes find the packages of this checkout, installed or not, and
compute threads leave the cores to the processes a test runs side by side."""

from __future__ import annotations

import os
from pathlib import Path

from chiron_engine.runtime.torch_environment import prepare_environment

ROOT = Path(__file__).resolve().parent.parent

os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

prepare_environment()

# Read where a kernel is defined, so before any test module is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
