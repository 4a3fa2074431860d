"""The GPUs that engine processes on this host may take, without loading torch."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess

QUERY_TIMEOUT_S = 10.0


def usable_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, one entry per GPU; empty where torch cannot use any."""
    if _torch_is_cpu_build():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    return _all_gpus()


def _torch_is_cpu_build() -> bool:
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return True


def _all_gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return []
    return result.stdout.split() if result.returncode == 0 else []
