from __future__ import annotations

from pathlib import Path

import pytest

from chiron_engine.sim.profiles import load_profile
from tests.cli.chiron_process import chiron
from tests.core.simulated_engine import COSTS
from tests.sim.test_calibration import step_log


def test_a_step_log_becomes_a_profile(tmp_path: Path) -> None:
    log, out = step_log(tmp_path / "steps.jsonl"), tmp_path / "mine.json"
    result = chiron(
        *("calibrate", str(log), "--out", str(out), "--name", "l4/tiny/tp2/fp8", "--kv-tokens", "50000")
    )
    assert result.returncode == 0, result.stderr
    assert "l4/tiny/tp2/fp8" in result.stdout and "in the mean" in result.stdout
    profile = load_profile(str(out))
    assert (profile.name, profile.gpus, profile.kv_capacity_tokens) == ("l4/tiny/tp2/fp8", 2, 50_000)
    assert (profile.max_slots, profile.max_step_tokens) == (32, 512)
    assert profile.step_times.seconds(10, 5000, 0, 0) == pytest.approx(COSTS.seconds(10, 5000), rel=0.01)
    assert profile.step_times.extrapolated == 0
    profile.step_times.seconds(10, 50_000, 0, 0)
    assert profile.step_times.extrapolated == 1
    with pytest.raises(ValueError, match="the profile goes to"):
        profile.step_times.seconds(10, 50_001, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["/no/such/log", "--out", "x"], 1, "/no/such/log cannot be read"),
        (["{log}", "--out", "x", "--name", "mine"], 2, "GPU/MODEL/tpN/precision"),
        (["{log}"], 2, "--out"),
        (["{short}", "--out", "x"], 2, "at least 200 are needed"),
        (["{log}", "--out", "/no/such/folder/x"], 1, "cannot be written"),
        (["{log}", "--out", "x", "--kv-bytes-per-token", "9" * 18], 2, "copy_s_per_kv_token is"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    log = step_log(tmp_path / "log")
    short = tmp_path / "short"
    short.write_text("\n".join(log.read_text().splitlines()[:20]))
    result = chiron("calibrate", *(a.format(log=log, short=short) for a in arguments))
    assert result.returncode == code, result.stderr
    assert words in result.stderr.replace("\n", " ") and "Traceback" not in result.stderr
