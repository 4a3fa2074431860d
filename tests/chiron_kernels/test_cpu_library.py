"""Compiling the CPU kernels: once, whole or not at all, and with a reason where it cannot be."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from chiron_kernels.cpu import library as compiling
from chiron_kernels.cpu.library import KernelsUnavailable, open_library

OPEN = (
    "import sys; from pathlib import Path; from chiron_kernels.cpu.library import open_library; "
    "open_library(Path(sys.argv[1]))"
)


def test_processes_that_start_together_end_up_with_one_library(library: ctypes.CDLL, tmp_path: Path) -> None:
    cache = tmp_path / "new" / "kernels"
    running = [subprocess.Popen([sys.executable, "-c", OPEN, str(cache)]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1


def test_torch_and_the_kernels_share_their_threads(library: ctypes.CDLL) -> None:
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert len({line.split()[-1] for line in mapped.splitlines() if "libgomp" in line}) == 1


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: ctypes.CDLL) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(KernelsUnavailable, match="no C compiler"):
        open_library(tmp_path / "a")


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: ctypes.CDLL
) -> None:
    broken = tmp_path / "gcc"
    broken.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(KernelsUnavailable, match="out of luck"):
        open_library(tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, library: ctypes.CDLL) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KernelsUnavailable, match="cannot write"):
        open_library(tmp_path / "file" / "kernels")


def test_a_cpu_that_lacks_instructions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiling.torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    monkeypatch.setattr(compiling.platform, "machine", lambda: "x86_64")
    with pytest.raises(KernelsUnavailable, match="lacks avx512_bw, avx512_dq, avx512_vl"):
        open_library(tmp_path / "c")
    monkeypatch.setattr(compiling.platform, "machine", lambda: "aarch64")
    with pytest.raises(KernelsUnavailable, match="not aarch64"):
        open_library(tmp_path / "d")


def test_a_damaged_library_is_compiled_again(tmp_path: Path, library: ctypes.CDLL) -> None:
    cache = tmp_path / "kernels"
    first = subprocess.run([sys.executable, "-c", OPEN, str(cache)], timeout=120)
    (built,) = cache.iterdir()
    whole = built.stat().st_size
    built.write_bytes(built.read_bytes()[:1000])
    again = subprocess.run([sys.executable, "-c", OPEN, str(cache)], timeout=120)
    assert first.returncode == again.returncode == 0 and built.stat().st_size == whole


def test_a_compiled_library_needs_no_compiler(
    tmp_path: Path, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "kernels"
    subprocess.run([sys.executable, "-c", OPEN, str(cache)], timeout=120, check=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "")
    assert subprocess.run([sys.executable, "-c", OPEN, str(cache)], timeout=120).returncode == 0
