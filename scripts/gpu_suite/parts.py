"""Parts of the suite in processes of their own: a kernel that fails may take its process with it."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

PARTS = ("tests", "kernel_tests", "microbenchmarks")

TEST_FOLDERS = ("tests/gpu", "tests/chiron_kernels")
KERNEL_TEST_FOLDERS = ("tests/chiron_kernels/gpu",)
"""Tests that run anywhere, so they are not marked: where there is a GPU they run on it."""

TEST_SECONDS, KERNEL_TEST_SECONDS, BENCHMARK_SECONDS = 90, 110, 100
LAST_CASE_SECONDS = 15
"""What the case takes that a benchmark begins just in time."""

STOPPING_SECONDS = 10
SHOWN = 4000
"""Characters of what a part wrote last."""


def run_parts(tests: bool, has_gpu: bool, results: Path) -> dict[str, Any]:
    """PARTS by name: each says how it went, or why it did not run. results: folder of the benchmarks'."""
    left_out = {"not_run": "--no-tests"}
    return {
        "tests": run_tests("gpu", TEST_FOLDERS, TEST_SECONDS) if tests else left_out,
        "kernel_tests": run_tests("not gpu", KERNEL_TEST_FOLDERS, KERNEL_TEST_SECONDS) if tests else left_out,
        "microbenchmarks": run_benchmarks(results) if has_gpu else {"not_run": "needs a GPU"},
    }


def run_tests(marked: str, folders: Sequence[str], seconds: float) -> dict[str, Any]:
    """Of the tests whose marks fit: passed, failed, skipped; and stopped_after_s, where not all had time."""
    if importlib.util.find_spec("pytest") is None:
        return {"not_run": "pytest is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-m", marked, "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        code, in_time = run_process(["pytest", *options, f"--junitxml={report}", *folders], seconds)
        if not report.exists():
            return {"not_run": f"pytest ended with {code}" if in_time else f"stopped after {seconds:.0f} s"}
        return _counts(report) | ({} if in_time else {"stopped_after_s": seconds})


def _counts(report: Path) -> dict[str, Any]:
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failed - errors - skipped, "failed": failed + errors, "skipped": skipped}


def run_benchmarks(results: Path) -> dict[str, Any]:
    """The kernels' microbenchmarks, without peers. They write their results after each case."""
    words = ["benchmarks.run", "--no-peers", "--seconds", str(BENCHMARK_SECONDS), "--out", str(results)]
    seconds = BENCHMARK_SECONDS + LAST_CASE_SECONDS
    code, in_time = run_process(words, seconds)
    return {"failed": code != 0} | ({} if in_time else {"stopped_after_s": seconds})


def run_process(module: Sequence[str], seconds: float) -> tuple[int, bool]:
    """`python -m module...`: how it ended, and whether by itself. Interrupted when time is up, so that it can
    still write what it has."""
    process = subprocess.Popen(
        [sys.executable, "-m", *module], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    in_time = True
    try:
        written, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        in_time = False
        process.send_signal(signal.SIGINT)
        written = _last_words(process)
    print(written[-SHOWN:], file=sys.stderr)
    return process.returncode, in_time


def _last_words(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=STOPPING_SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]
