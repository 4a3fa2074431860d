from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from chiron_engine.commands import host_checks
from chiron_engine.commands.host_checks import FAIL, OK, WARN
from tests.cli.chiron_process import chiron


def test_json_names_every_check() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        result = chiron("doctor", "--json", "--port", str(port))
    report = json.loads(result.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert {
        "python",
        "torch",
        "torch import",
        "cpu",
        "cpu kernels",
        "gpu",
        "memory",
        "disk",
        "smollm2",
    } <= checks.keys()
    assert checks["python"]["status"] == OK
    assert checks[f"port {port}"]["status"] == WARN
    assert str(os.getpid()) in checks[f"port {port}"]["detail"]
    assert report["ok"] == all(check["status"] != FAIL for check in report["checks"])
    assert result.returncode == (0 if report["ok"] else 1)


def test_a_failure_makes_the_exit_code(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.write_text("")
    result = chiron("doctor", env={"CHIRON_CACHE": str(folder / "cache")})
    assert result.returncode == 1
    assert "FAIL  disk" in result.stdout


def test_a_package_out_of_range_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_checks, "REQUIRED", {"pytest": ">=9999", "no-such-package-at-all": ""})
    checks = host_checks.check_packages()
    assert [check.status for check in checks] == [FAIL, FAIL]
    assert ">=9999" in checks[0].detail
    assert checks[1].detail == "not installed"


def test_a_broken_torch_is_reported_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_checks, "TORCH_PROBE", "raise ImportError('libtorch.so is missing')")
    check = host_checks.check_torch()
    assert check.status == FAIL
    assert "libtorch.so is missing" in check.detail


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_checks, "LITTLE_MEMORY", 1 << 60)
    assert host_checks.check_memory().status == WARN


def test_kernels_that_cannot_be_compiled_are_a_warning_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHIRON_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    check = host_checks.check_kernels()
    assert check.status == WARN and ("no C compiler" in check.detail or "lacks" in check.detail)


@pytest.mark.parametrize(
    ("installed", "status", "advice"),
    [
        ({"torch": "2.11.0+cu130", "triton": "3.6.0"}, OK, ""),
        ({"torch": "2.11.0+cu130"}, WARN, "install triton"),
        ({"torch": "2.13.0+cpu", "triton": "3.9.0"}, WARN, "torch is the CPU build"),
    ],
)
def test_a_gpu_wants_torch_and_triton(
    installed: dict[str, str], status: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = subprocess.CompletedProcess([], 0, "NVIDIA H100, 81559 MiB, 81000 MiB, 580.65\n", "")
    monkeypatch.setattr(host_checks.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(host_checks, "_run", lambda command: told)
    monkeypatch.setattr(host_checks, "_installed", lambda name: installed.get(name, ""))
    check = host_checks.check_gpu()
    assert (check.status, check.detail) == (status, "NVIDIA H100, 81559 MiB, 81000 MiB, 580.65")
    assert advice in check.advice
