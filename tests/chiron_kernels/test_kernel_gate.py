"""The compile gate, from its command to its verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from scripts.kernel_gate import baseline  # noqa: E402
from scripts.kernel_gate.run import main  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def gate(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "scripts" / "kernel_gate.sh", *words]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.skipif(
    triton.__version__ not in {key.triton for key in baseline.read_baseline(baseline.PATH)},
    reason="the baseline does not know this version of Triton",
)
def test_a_sample_of_the_kernels_passes() -> None:
    done = gate("--sample", "--table")
    assert done.returncode == 0, done.stderr
    assert "all kernels pass" in done.stderr
    assert f"| add_rms_norm 576 bf16 | 90 | {triton.__version__} |" in done.stdout


def test_what_is_compiled_badly_is_refused_by_name(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = gate("--installed", "--cases", "tests.chiron_kernels.refused_cases", "--json", report)
    assert done.returncode == 1
    results = json.loads(report.read_text())
    faults = "\n".join(results["faults"])
    where = f"sm_90 | triton {triton.__version__}"
    assert f"spills | {where}: registers spill: " in faults
    assert f"loads narrowly | {where}: 32 loads of under 16 bytes a thread, limit 0" in faults
    assert f"does not compile | {where}: does not compile: CompilationError" in faults
    assert "undefined is not defined" in faults
    died = "does not compile: the compiler ended with 9; last it wrote: assertion failed in a pass"
    assert f"crashes | {where}: {died}" in faults
    kernels = {kernel["case"]: kernel for kernel in results["kernels"]}
    assert kernels["spills"]["stack"] > 0
    assert kernels["loads narrowly"]["wide_loads"] == 0


def test_two_cases_of_one_name_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--installed", "--cases", "tests.chiron_kernels.two_of_a_name_cases"]) == 2
    assert "two_of_a_name_cases has two cases 'norm' for sm_90" in capsys.readouterr().err


def test_nothing_to_compile_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--installed", "--only", "no such kernel"]) == 2
    assert "no case has 'no such kernel' in its name" in capsys.readouterr().err
