"""The processes that the GPU suite starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.gpu_suite import parts
from scripts.gpu_suite.parts import run_parts, run_process, run_tests
from scripts.gpu_suite.report import _benchmarks, _tests


def test_tests_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_a(): pass\n\ndef test_b(): assert False\n")
    counts = run_tests("not gpu", [str(tmp_path)], 60)
    assert counts == {"passed": 1, "failed": 1, "skipped": 0}
    assert _tests(counts) == "1 passed, 1 failed, 0 skipped"


def test_tests_out_of_time_are_counted_as_far_as_they_came(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import time\n\ndef test_a(): pass\n\ndef test_b(): time.sleep(600)\n"
    )
    counts = run_tests("not gpu", [str(tmp_path)], 8)
    assert counts["passed"] == 1
    assert _tests(counts).endswith("stopped after 8 s")


def test_how_a_process_ends_is_told() -> None:
    assert run_process(["no_such_module"], 60) == (1, True)


def test_what_needs_a_gpu_is_left_out_without_one(tmp_path: Path) -> None:
    done = run_parts(tests=False, has_gpu=False, results=tmp_path)
    assert set(done) == set(parts.PARTS)
    assert _benchmarks(done["microbenchmarks"]) == "not run (needs a GPU)"


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"failed": False}, "microbenchmarks.md"),
        ({"failed": True, "stopped_after_s": 5}, "microbenchmarks.md, with failures, stopped after 5 s"),
    ],
)
def test_benchmarks_in_words(part: dict[str, object], says: str) -> None:
    assert _benchmarks(part) == says
