from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "size_report.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60
    )


def test_counts_files_lines_and_functions(tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text("def one():\n    return 1\n")
    (tmp_path / "long.py").write_text(
        "class C:\n    def four(self):\n        a = 1\n        b = 2\n        return a + b\n"
    )
    (tmp_path / "made_pb2.py").write_text("def generated():\n    return 0\n")
    result = run(str(tmp_path), "--json")
    assert result.returncode == 0, result.stderr
    (figures,) = json.loads(result.stdout).values()
    assert figures["files"] == 2
    assert figures["lines"] == 7
    assert figures["functions"] == 2
    assert (figures["median"], figures["p90"]) == (2, 4)
    assert figures["longest"] == {"name": "four", "lines": 4}
    assert figures["biggest_file"] == {"name": "long.py", "lines": 5}


def test_reports_every_package_of_the_project() -> None:
    result = run()
    assert result.returncode == 0, result.stderr
    for folder in ("chiron_engine/policy/iteration", "chiron_engine/core", "kernels/chiron_kernels"):
        assert folder in result.stdout
    assert "_pb2" not in result.stdout


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    result = run(str(tmp_path / "absent"))
    assert result.returncode == 2
    assert "absent" in result.stderr
