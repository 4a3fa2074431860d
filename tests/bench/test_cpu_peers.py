"""scripts/bench_cpu_peers.py with engines that compute nothing: turns, failures, figures, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from scripts import bench_cpu_peers
from scripts.cpu_peers.environments import ROOT, InstallError, last_lines
from scripts.cpu_peers.peers import OURS, PEERS, Load, Peer, parse_option
from scripts.cpu_peers.report import medians, ratios, table
from scripts.cpu_peers.turns import WARM_UP_TOKENS, Contestant, agreement, measure_load
from scripts.cpu_peers.worker import Pass, Worker, WorkerError

FAKE = """
import os, sys, threading, time
from scripts.cpu_peers.worker_loop import Started, serve

class Engine:
    def __init__(self, settings):
        self.settings = settings
        if settings.get("spins"):
            threading.Thread(target=self.spin, daemon=True).start()

    def spin(self):
        while True:
            pass

    def generate(self, prompts, output_tokens):
        print("noise on the standard output")
        time.sleep(self.settings.get("seconds", 0.0))
        if len(prompts) > self.settings.get("holds", 99):
            raise MemoryError("too many")
        if self.settings.get("dies"):
            os._exit(7)
        return [[prompt[0]] * (output_tokens - self.settings.get("missing", 0)) for prompt in prompts]

def start(settings):
    if settings.get("broken"):
        raise ValueError("no such weights")
    return Started(Engine(settings), {"fake": "1.2"}, {"weights": "none"})

serve(start)
"""


def fake_worker(tmp_path: Path, name: str = "fake") -> Worker:
    script = tmp_path / f"{name}.py"
    script.write_text(FAKE)
    return Worker(name, [sys.executable, script], {**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.fixture
def worker(tmp_path: Path):
    worker = fake_worker(tmp_path)
    yield worker
    worker.close()


def test_a_worker_answers_with_its_versions_and_the_tokens_of_each_prompt(worker: Worker) -> None:
    worker.start({"seconds": 0.05})
    assert (worker.versions, worker.configuration) == ({"fake": "1.2"}, {"weights": "none"})
    done = worker.run([[5, 6], [7, 8]], 3)
    assert done.outputs == [[5, 5, 5], [7, 7, 7]]
    assert done.seconds >= 0.05
    assert done.output_tokens_per_s == pytest.approx(6 / done.seconds)


def test_a_worker_that_waits_takes_no_time_even_if_its_threads_spin(worker: Worker) -> None:
    worker.start({"spins": True})
    worker.run([[1]], 1)
    stat = Path(f"/proc/{worker.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "T":  # all its threads have stopped
        time.sleep(0.01)
    before = worker.cpu_s()
    time.sleep(0.2)
    assert worker.cpu_s() == before
    assert worker.run([[2]], 1).outputs == [[2]]


def test_a_stopped_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    fake_worker(tmp_path).close()  # writes the script
    parent = (
        "import os, sys\n"
        "from scripts.cpu_peers.worker import Worker\n"
        "worker = Worker('fake', sys.argv[1:], dict(os.environ))\n"
        "worker.start({})\n"
        "print(worker.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", parent, sys.executable, str(tmp_path / "fake.py")],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 30
    while running(stat) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(stat)


def running(stat: Path) -> bool:
    """Whether there is such a process, and not only what nobody has waited for."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"holds": 0}, "fake: MemoryError: too many"),
        ({"missing": 1}, "1 outputs of \\[3\\] tokens where 1 of 4"),
        ({"dies": True}, "ended with exit code 7"),
        ({"seconds": 60}, "no answer within 0.3 s"),
    ],
)
def test_a_pass_that_fails_says_how(worker: Worker, settings: dict[str, Any], said: str) -> None:
    worker.start(settings)
    with pytest.raises(WorkerError, match=said):
        worker.run([[1]], 4, timeout_s=0.3 if "seconds" in settings else 60.0)


def test_an_engine_that_does_not_start_says_why(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="ValueError: no such weights"):
        worker.start({"broken": True})


@dataclass
class FakeRunner:
    """Takes a second for each prompt; fails from `fails_at` prompts on."""

    name: str
    log: list[tuple[str, int, int, int]]
    fails_at: int = 1 << 30
    closed: bool = False

    def run(self, prompts: list[list[int]], output_tokens: int) -> Pass:
        self.log.append((self.name, len(prompts), prompts[0][0], output_tokens))
        if len(prompts) >= self.fails_at:
            raise WorkerError(f"{self.name} is out of memory")
        return Pass(float(len(prompts)), [[prompt[0]] * output_tokens for prompt in prompts])

    def cpu_s(self) -> float:
        return 0.0

    def close(self) -> None:
        self.closed = True


def seeds_as_prompts(count: int, seed: int) -> list[list[int]]:
    return [[seed]] * count


def test_engines_take_turns_on_prompts_of_their_own_for_each_pass() -> None:
    log: list[tuple[str, int, int, int]] = []
    contestants = [Contestant(name, FakeRunner(name, log)) for name in ("ours", "theirs")]
    for requests in (1, 2):
        measure_load(contestants, requests, 2, 16, seeds_as_prompts, lambda text: None)
    assert [name for name, *_ in log] == ["ours", "theirs"] * 6
    assert [tokens for *_, tokens in log] == [WARM_UP_TOKENS] * 2 + [16] * 4 + [WARM_UP_TOKENS] * 2 + [16] * 4
    pairs = list(zip(log[::2], log[1::2], strict=True))
    assert all(ours[1:] == theirs[1:] for ours, theirs in pairs)
    assert len({ours[2] for ours, _ in pairs}) == len(pairs)
    assert contestants[0].rates() == {1: [16.0, 16.0], 2: [16.0, 16.0]}


def test_an_engine_that_fails_is_out_and_the_others_go_on() -> None:
    log: list[tuple[str, int, int, int]] = []
    weak = FakeRunner("weak", log, fails_at=2)
    contestants = [Contestant("ours", FakeRunner("ours", log)), Contestant("weak", weak)]
    for requests in (1, 2, 4):
        measure_load(contestants, requests, 1, 8, seeds_as_prompts, lambda text: None)
    assert contestants[1].error == "weak is out of memory"
    assert weak.closed
    assert set(contestants[0].rates()) == {1, 2, 4}
    assert set(contestants[1].rates()) == {1}


def test_agreement_counts_first_tokens() -> None:
    assert agreement([[1, 2], [3, 4]], [[1, 9], [5, 4]]) == 0.5


def test_ratios_are_ours_over_theirs_where_both_were_measured() -> None:
    ours = medians({1: [40.0, 60.0, 50.0], 8: [200.0], 32: []})
    assert ours == {1: 50.0, 8: 200.0}
    assert ratios(ours, {"a": {1: 25.0, 8: 400.0, 32: 1.0}, "b": {}}) == {"a": {1: 2.0, 8: 0.5}, "b": {}}


def test_the_table_has_a_row_a_load_and_a_column_an_engine() -> None:
    rates = {"ours": {1: 50.0, 8: 200.0}, "a": {1: 25.0}}
    assert table({"ours": "this engine", "a": "A 1.0"}, rates, "ours", [1, 8]) == "\n".join(
        [
            "| requests at once | this engine | A 1.0 |",
            "|---|---|---|",
            "| 1 | 50 | 25 (2.00x) |",
            "| 8 | 200 | - |",
        ]
    )


def test_options_are_json_or_text() -> None:
    assert parse_option("openvino.weights=fp16") == ("openvino", "weights", "fp16")
    assert parse_option('openvino.properties={"A": "f32"}') == ("openvino", "properties", {"A": "f32"})
    assert parse_option("vllm.max_num_batched_tokens=256") == ("vllm", "max_num_batched_tokens", 256)


@pytest.mark.parametrize("text", ["weights=fp16", "openvino.weights", "nobody.dtype=a", "vllm.weights=int8"])
def test_options_nobody_has_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"PEER\.NAME=VALUE|has no option"):
        parse_option(text)


@dataclass(frozen=True)
class FakePeer(Peer):
    """One of the fake workers above; `error` instead of an environment."""

    folder: Path = Path()
    error: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)

    def worker(self, name: str) -> Worker:
        if self.error is not None:
            raise InstallError(self.error)
        return fake_worker(self.folder, name)

    def settings(self, load: Load, options: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self.given)


def test_the_report_names_peers_that_failed_and_has_the_figures_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(title: str, error: str | None = None, **given: Any) -> FakePeer:
        return FakePeer(title, None, "fake", {"dtype": "int8"}, folder=tmp_path, error=error, given=given)

    monkeypatch.setattr(bench_cpu_peers, "CHIRON", fake("this engine", seconds=0.1))
    monkeypatch.setitem(PEERS, "openvino", fake("OpenVINO", seconds=0.2))
    monkeypatch.setitem(PEERS, "vllm", fake("vLLM", error="no such package"))
    monkeypatch.setitem(PEERS, "llamacpp", fake("llama.cpp", holds=1))
    monkeypatch.setattr(bench_cpu_peers, "vocabulary_of", lambda model: 100)
    monkeypatch.setattr(bench_cpu_peers.signal, "signal", lambda *handler: None)
    target = tmp_path / "out.json"
    words = ["bench_cpu_peers.py", "--requests", "1,2", "--passes", "1", "--output-tokens", "4"]
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(target)])
    assert bench_cpu_peers.main() == 1
    result = json.loads(target.read_text())
    assert result["errors"] == {"vllm": "no such package", "llamacpp": "llamacpp: MemoryError: too many"}
    assert set(result["ratios"]["openvino"]) == {"1", "2"}
    rates = {name: about["output_tokens_per_s"] for name, about in result["engines"].items()}
    assert result["ratios"]["openvino"]["1"] == rates[OURS]["1"] / rates["openvino"]["1"]
    assert set(result["ratios"]["llamacpp"]) == {"1"}
    assert result["engines"]["openvino"]["versions"] == {"fake": "1.2"}
    assert result["engines"][OURS]["passes"]["2"][0]["output_tokens_per_s"] > 0
    assert result["command"].startswith("bench_cpu_peers.py --requests 1,2")
    printed = capsys.readouterr()
    assert "| 2 | " in printed.out
    assert "vllm failed: no such package" in printed.err


def test_last_lines_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a\nb\nc\n")
    assert last_lines(log, 2) == "b\nc"
