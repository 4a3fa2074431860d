"""`chiron simulate` through the command line: what it refuses, what it writes, and that it repeats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chiron_engine.cli import main
from chiron_engine.commands.durations import format_duration, parse_duration
from chiron_engine.commands.simulation_options import itl_seconds
from tests.cli.chiron_process import CHIRON, chiron

SMALL = "poisson:rate=4,duration=60,lengths=512/32"
BATCH = "burst:count=100,lengths=1000/50"
KEYS = {
    "policy",
    "trace",
    "profile",
    "requests",
    "slo_attainment",
    "ttft_s",
    "itl_ms",
    "gpu_hours",
    "lower_bound_gpu_hours",
    "peak_instances",
    "scaling_actions",
    "preemptions",
    "throughput_rps",
    "wall_s",
}


class Outcome:
    """Of one command run in this process."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


@pytest.fixture
def simulate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["chiron", "simulate", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


def rows(*lines: str) -> str:
    return "\n".join(["arrival_s,prompt_tokens,output_tokens", *lines]) + "\n"


BAD_TRACES = [
    (rows("1,10,5", "0.5,10,5"), "1 of 2 rows has an arrival before that of the row above"),
    (rows("-1,10,5", "0,10,5"), "1 of 2 rows has a negative arrival"),
    (rows("nan,10,5"), "not finite"),
    (rows(), "0 rows"),
    ("", "empty"),
    ("arrival_s,prompt_tokens\n0,5\n", "no column output_tokens"),
    ("when,prompt,output_tokens\n0,5,5\n", "no column arrival_s, prompt_tokens"),
    (rows("0,0,5", "1,0,5", "2,3,4"), "2 of 3 rows have a zero-length prompt"),
    (rows("0,ten,5"), "no number in prompt_tokens"),
    ("arrival_s,prompt_tokens,output_tokens,slo_class\n0,5,5,gold\n", "an unknown SLO class (line 2: gold)"),
    (rows("0,10,5", "1,500000,5"), "1 of 2 requests of trace do not fit on an instance: the first, row 2"),
]


@pytest.mark.parametrize(("content", "words"), BAD_TRACES, ids=[words for _, words in BAD_TRACES])
@pytest.mark.parametrize("option", ["--interactive", "--batch"])
def test_a_bad_trace_is_told_before_the_run(
    simulate: Any, tmp_path: Path, content: str, words: str, option: str
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(content)
    outcome = simulate(option, str(trace))
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.err.startswith("chiron: ")
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


BAD_OPTIONS = [
    ([], "give a trace"),
    (["--interactive", "no-such-trace"], "azure-conv"),
    (["--interactive", "/no/such/file.csv"], "/no/such/file.csv"),
    (["--interactive", SMALL, "--profile", "h100/gpt"], "h100/llama-3.1-8b/tp1/bf16"),
    (["--interactive", SMALL, "--policy", "magic"], "there are chiron, paper, paper-literal, static:N"),
    (["--interactive", SMALL, "--policy", "clairvoyant:0.5"], "at least 1"),
    (["--interactive", SMALL, "--policy", "clairvoyant:x"], "'x' is not a number over 0"),
    (["--interactive", SMALL, "--policy", "chiron,"], "there is no policy ''"),
    (["--interactive", SMALL, "--policy", "static:0"], "at least 1"),
    (["--interactive", SMALL, "--policy", "static:9", "--max-gpus", "8"], "at most 8 fit"),
    (["--interactive", SMALL, "--policy", "static:x"], "static:x"),
    (["--interactive", SMALL, "--local-autoscaler", "magic"], "adaptive"),
    (["--interactive", SMALL, "--load", "0"], "--load: '0' is not a number over 0"),
    (["--interactive", SMALL, "--load", "-1"], "--load"),
    (["--interactive", SMALL, "--load", "nan"], "--load"),
    (["--batch", BATCH, "--batch-load", "inf"], "--batch-load"),
    (["--interactive", SMALL, "--itl-slo", "1"], "the best on offer is 6."),
    (["--interactive", SMALL, "--itl-slo", "0.5x"], "ITL SLO"),
    (["--interactive", SMALL, "--itl-slo", "nan"], "--itl-slo: 'nan'"),
    (["--interactive", SMALL, "--itl-slo", "0x"], "--itl-slo"),
    (["--interactive", SMALL, "--ttft-slo", "1ms"], "TTFT SLO of 0.001 s"),
    (["--interactive", SMALL, "--ttft-slo", "0"], "--ttft-slo: '0' is not a duration over 0"),
    (["--interactive", SMALL, "--ttft-slo", "soon"], "'soon' is no duration"),
    (["--batch", BATCH, "--batch-deadline", "0.01"], "the best on offer is"),
    (["--interactive", SMALL, "--load-time", "-1"], "--load-time"),
    (["--interactive", SMALL, "--load-jitter", "2"], "load_jitter"),
    (["--interactive", SMALL, "--noise", "nan"], "--noise"),
    (["--interactive", SMALL, "--failed-launches", "1.5"], "failed_launches"),
    (["--interactive", SMALL, "--max-gpus", "0"], "max_gpus"),
    (["--interactive", SMALL, "--max-gpus", "1", "--profile", "h100/llama-3.1-70b/tp4/bf16"], "takes 4 GPUs"),
    (["--interactive", SMALL, "--initial-instances", "51"], "initial_instances"),
    (["--interactive", "poisson:duration=4"], "rate is missing"),
    (["--interactive", "poisson:rate=0.01,duration=1000", "--duration", "0.001"], "first 0.001 s"),
    (["--interactive", SMALL, "--plot", "figure.jpeg"], ".png"),
    (["--interactive", "burst:count=2,over=1e300"], "at most 3e+06 s can be simulated"),
    (["--interactive", "burst:count=2,over=10000", "--tick", "1ms"], "at most 3000 s can be simulated"),
    (["--interactive", SMALL, "--tick", "1e-300"], "tick_s is 1e-300; it must be at least 0.001"),
    (["--interactive", SMALL, "--tick", "1e300"], "tick_s is 1e+300; it must be at most 3600"),
    (["--interactive", SMALL, "--noise", "30"], "step_noise is 30; it must be at most 2"),
    (["--interactive", SMALL, "--rpc-delay", "1e300"], "rpc_delay_s is 1e+300; it must be at most 60"),
    (["--interactive", SMALL, "--load-time", "1e300"], "load_time_s is 1e+300; it must be at most 86400"),
    (["--interactive", SMALL, "--slow-factor", "1e9"], "it must be from 1 to 1000"),
    (["--interactive", SMALL, "--batch-load", "2"], "--batch-load says something of batch requests"),
    (["--interactive", SMALL, "--batch-deadline", "5"], "--batch-deadline says something of batch requests"),
    (["--interactive", "poisson:rate=5,lengths=1/200000", "--max-tokens", "200000"], "do not fit"),
    (["--interactive", SMALL, "--plot", "/no/such/folder/figure.png"], "/no/such/folder"),
    (["--list", "--json", "/no/such/folder/out.json"], "/no/such/folder"),
    (["--interactive", SMALL, "--json", "/no/such/folder/out.json"], "/no/such/folder"),
]


@pytest.mark.parametrize(
    ("arguments", "words"),
    BAD_OPTIONS,
    ids=[" ".join(arguments)[-60:] for arguments, _ in BAD_OPTIONS],
)
def test_bad_options_exit_2_on_one_line(simulate: Any, arguments: list[str], words: str) -> None:
    outcome = simulate(*arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_an_unknown_class_is_no_option() -> None:
    result = chiron("simulate", "--gold", SMALL)
    assert result.returncode == 2
    assert "--gold" in result.stderr


def without_wall(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if '"wall_s"' not in line)


def test_another_process_writes_the_same_bytes() -> None:
    command = ["simulate", "--interactive", SMALL, "--batch", BATCH, "--policy", "chiron,static:2"]
    command += ["--noise", "0.1", "--seed", "7", "--json", "-"]
    first, second = (chiron(*command, env={"PYTHONHASHSEED": seed}) for seed in ("1", "2"))
    assert first.returncode == 0, first.stderr
    assert without_wall(first.stdout) == without_wall(second.stdout)
    other = chiron(*command[:-3], "8", *command[-2:])
    assert without_wall(first.stdout) != without_wall(other.stdout)


def test_one_policy_is_one_object_with_the_keys_promised(simulate: Any) -> None:
    outcome = simulate("--interactive", SMALL, "--batch", BATCH, "--json", "-")
    assert outcome.code == 0, outcome.err
    figures = json.loads(outcome.out)
    assert figures.keys() >= KEYS
    assert figures["policy"] == "chiron"
    assert figures["slo_attainment"].keys() == {"interactive", "batch"}
    assert figures["ttft_s"].keys() == figures["itl_ms"].keys() == {"p50", "p99"}
    assert 0 < figures["lower_bound_gpu_hours"] <= figures["gpu_hours"]
    assert figures["slo"]["interactive"] == {"ttft_s": 10.0, "itl_s": 0.2}
    assert "GPU" in outcome.err  # the table


def test_the_clairvoyant_schedule_is_a_policy(simulate: Any) -> None:
    arguments = [
        "--interactive",
        SMALL,
        "--batch",
        BATCH,
        "--policy",
        "clairvoyant,clairvoyant:3",
        "--no-bound",
    ]
    outcome = simulate(*arguments, "--json", "-")
    assert outcome.code == 0, outcome.err
    runs = json.loads(outcome.out)
    assert [run["policy"] for run in runs] == ["clairvoyant", "clairvoyant:3"]
    assert [run["requests"] for run in runs] == [runs[0]["requests"]] * 2
    assert all(run["lower_bound_gpu_hours"] <= run["gpu_hours"] for run in runs)


def test_several_policies_are_a_list_and_a_table_with_a_row_each(simulate: Any, tmp_path: Path) -> None:
    file, plot = tmp_path / "out.json", tmp_path / "out.svg"
    arguments = ["--interactive", SMALL, "--policy", "static:1,static:2", "--no-bound", "--itl-slo", "3x"]
    outcome = simulate(*arguments, "--json", str(file), "--plot", str(plot))
    assert outcome.code == 0, outcome.err
    runs = json.loads(file.read_text())
    assert [run["policy"] for run in runs] == ["static:1", "static:2"]
    assert [run["peak_instances"] for run in runs] == [1, 2]
    assert all(run["lower_bound_gpu_hours"] is None for run in runs)
    assert all(run["slo_attainment"]["batch"] is None for run in runs)
    assert "static:1" in outcome.out
    assert "static:2" in outcome.out
    assert outcome.err == ""
    assert "static:2" in plot.read_text()


def test_no_bar_where_standard_error_is_no_terminal() -> None:
    result = chiron("simulate", "--interactive", SMALL, "--no-bound")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "interactive" in result.stdout


def test_a_request_that_cannot_attain_is_remarked_on(simulate: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(rows("0,100,5", "1,100000,5"))
    outcome = simulate("--interactive", str(trace), "--ttft-slo", "1", "--no-bound")
    assert outcome.code == 0
    assert "1 of 2 requests of trace cannot meet the TTFT SLO" in outcome.err


def test_a_folder_is_no_plot(simulate: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    outcome = simulate("--interactive", SMALL, "--plot", str(tmp_path / "a.png"))
    assert (outcome.code, outcome.out) == (2, "")
    assert "is a folder" in outcome.err


def test_a_run_shorter_than_a_tick_has_a_plot(simulate: Any, tmp_path: Path) -> None:
    plot = tmp_path / "a.svg"
    outcome = simulate("--interactive", "burst:count=1,lengths=100/2", "--no-bound", "--plot", str(plot))
    assert outcome.code == 0, outcome.err
    assert "1 request of burst" in outcome.out
    assert plot.is_file()


@pytest.mark.parametrize("json_file", [[], ["--json", "-"]])
def test_a_full_disk_is_told_on_one_line(json_file: list[str]) -> None:
    command = [*CHIRON, "simulate", "--interactive", SMALL, *json_file]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr == "chiron: the output cannot be written: No space left on device\n"


def test_a_fleet_that_never_serves_ends_with_a_word(simulate: Any) -> None:
    outcome = simulate("--batch", BATCH, "--failed-launches", "1", "--batch-deadline", "60", "--no-bound")
    assert outcome.code == 1
    assert outcome.err.startswith("chiron: nothing serves the 100 requests that are left")
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_what_is_capped_is_weighed_as_capped(simulate: Any) -> None:
    """The lower bound and the checks count the outputs that are served."""
    long = "poisson:rate=2,duration=30,lengths=100/200000"
    outcome = simulate("--interactive", long, "--max-tokens", "10", "--json", "-")
    assert outcome.code == 0, outcome.err
    figures = json.loads(outcome.out)
    assert figures["lower_bound_gpu_hours"] <= figures["gpu_hours"]
    short = json.loads(simulate("--interactive", long.replace("200000", "10"), "--json", "-").out)
    assert figures["lower_bound_gpu_hours"] == short["lower_bound_gpu_hours"]


def test_one_file_may_hold_both_classes(simulate: Any, tmp_path: Path) -> None:
    trace = tmp_path / "both.csv"
    header = "arrival_s,prompt_tokens,output_tokens,slo_class\n"
    trace.write_text(header + "0,100,5,interactive\n1,100,5,batch\n2,100,5,interactive\n")
    outcome = simulate("--interactive", str(trace), "--batch", str(trace), "--no-bound", "--json", "-")
    assert json.loads(outcome.out)["requests_by_class"] == {"interactive": 2, "batch": 1}


def test_the_listing(simulate: Any) -> None:
    outcome = simulate("--list")
    for name in ("h100/llama-3.1-8b/tp1/bf16", "azure-conv", "paper-literal", "static:N", "adaptive"):
        assert f"  {name}\n" in outcome.out
    names = json.loads(simulate("--list", "--json", "-").out)
    assert names.keys() == {"profiles", "traces", "policies", "local_autoscalers"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45", 45.0), ("200ms", 0.2), ("1.5h", 5400.0), ("5 min", 300.0), ("0", 0.0), ("1e3", 1000.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "1..2", "5 weeks", "s", "٤s"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        parse_duration(text)


def test_an_itl_slo_is_milliseconds_or_so_many_steps() -> None:
    assert itl_seconds("200", 0.006) == pytest.approx(0.2)
    assert itl_seconds("0.05s", 0.006) == pytest.approx(0.05)
    assert itl_seconds("1.5x", 0.006) == pytest.approx(0.009)


def test_durations_are_shown_in_the_unit_people_say() -> None:
    shown = [format_duration(seconds) for seconds in (0.5, 75, 750, 7500)]
    assert shown == ["0.5 s", "75 s", "12 min 30 s", "2 h 05 min"]
