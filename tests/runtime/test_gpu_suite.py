"""The GPU suite's script, tried on the CPU, and the parts of it that need no device."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from scripts.gpu_suite.report import folder_name, markdown
from scripts.gpu_suite.step_grid import GridPoint, fit_step_time

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_script_runs_through_on_a_cpu_and_says_so(tmp_path: Path) -> None:
    command = [
        ROOT / "scripts" / "gpu_suite.sh",
        "--cpu-trial",
        "--no-tests",
        "--seconds",
        "60",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert results["is_gpu"] is False
    assert results["device"]["name"] == "cpu-trial"
    assert results["tests"] == results["kernel_tests"] == {"not_run": "--no-tests"}
    assert results["microbenchmarks"] == {"not_run": "needs a GPU"}
    model = results["models"][0]
    assert set(model["load_phases_s"]) == {"load weights", "KV cache", "warm up"}
    assert {p["decode_requests"] for p in model["grid"]} == {0, 1, 2, 4, 8}
    assert all(p["ms"] > 0 for p in model["grid"])
    assert model["throughput"]["output_tokens"] == 8 * 64
    assert min(model["swap"][key] for key in ("copy_out_gb_per_s", "copy_in_gb_per_s", "recompute_s")) > 0
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "None of these are GPU figures" in page
    assert page == markdown(results)


def test_out_of_time_is_said(tmp_path: Path) -> None:
    command = [
        ROOT / "scripts" / "gpu_suite.sh",
        "--cpu-trial",
        "--no-tests",
        "--seconds",
        "0",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert "decode of 8 at context 128: out of time" in results["skipped"]
    assert results["models"][0]["step_time_model"] is None


def test_the_fit_finds_the_coefficients_that_made_the_times() -> None:
    def point(n: int, context: int, tokens: int) -> GridPoint:
        seconds = 6e-3 + 1e-5 * n + 4e-8 * n * context + 2e-5 * tokens + 5e-10 * tokens * (context + tokens)
        return GridPoint(n, context, tokens, seconds * 1e3, seconds * 1e3, 3)

    points = [point(n, c, 0) for n in (1, 16, 256) for c in (128, 1024, 4096)]
    points += [point(0, c, p) for p in (16, 512, 4096) for c in (0, 8192)]
    model, error = fit_step_time(points)
    assert error < 1e-6
    assert model.base_s == pytest.approx(6e-3)
    assert model.per_request_s == pytest.approx(1e-5)
    assert model.per_kv_token_s == pytest.approx(4e-8)
    assert model.per_prompt_token_s == pytest.approx(2e-5)
    assert model.per_prompt_context_s == pytest.approx(5e-10)


def test_the_fit_keeps_coefficients_from_falling_below_zero() -> None:
    points = [GridPoint(n, 100, 0, 10.0 - n / 100, 1.0, 3) for n in (1, 10, 100)]
    model, _ = fit_step_time(points)
    assert model.per_request_s == 0.0
    assert model.base_s > 0


def test_folder_names() -> None:
    assert folder_name("NVIDIA H200") == "nvidia-h200"
    assert folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
