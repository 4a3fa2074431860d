"""The command of the measures: what cannot be measured as asked ends it with 2, before any run."""

from __future__ import annotations

import sys

import pytest

from scripts.evaluate_policies import main


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["step", "--profile", "tpu/gpt-9/tp1/bf16"], "there is no profile 'tpu/gpt-9/tp1/bf16'"),
        (["step", "--policy", "wishful"], "there is no policy 'wishful'"),
        (["step", "--scale", "0"], "--scale is 0.0; it must be over 0"),
        (["step", "--seed", "-1"], "--seed is -1; it must not be negative"),
        (["step", "--load-time", "-1"], "load_time_s is -1.0"),
        (["step", "--itl-slo", "3x"], "--itl-slo is for mixed"),
        (["mixed", "--itl-slo", "soon"], "'soon' is no duration"),
        (["step", "--plot", "figure.txt"], "--plot: the plot 'figure.txt' must end in"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_usage_errors_exit_with_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = [] if "--scale" in arguments else ["--scale", "0.01"]
    monkeypatch.setattr(sys, "argv", ["evaluate_policies.py", *arguments, *scale])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out
