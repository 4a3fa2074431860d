"""scripts/chaos.py on simulated engines, and what it takes for a violation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from chiron_engine import LLM, SamplingParams
from chiron_engine.rpc.v1 import batch_pb2, inference_pb2
from scripts.chaos_run.checks import Checks, kind_of
from scripts.chaos_run.judge import LogitJudge
from scripts.chaos_run.traffic import Batch, Stream
from scripts.chaos_run.workload import Asked

ROOT = Path(__file__).resolve().parent.parent.parent
ASKED = Asked(0, (1, 2, 3), 6)
EXPECTED = [10, 11, 12, 13, 14, 15]
CUT = "UNAVAILABLE: Socket closed"


def chaos(folder: Path, *more: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    small = ["--executor", "simulated", "--model", "tiny", "--requests", "4", "--lines", "20"]
    command = [
        sys.executable,
        str(ROOT / "scripts" / "chaos.py"),
        *small,
        "--out",
        str(folder),
        "--json",
        "-",
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [*command, *more],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_nothing_is_lost_or_doubled_when_engines_and_coordinators_are_killed(tmp_path: Path) -> None:
    run = chaos(tmp_path, "--kills", "1", "--kill-within", "1", "--seed", "3")
    assert run.returncode == 0, run.stdout + run.stderr
    seen = json.loads(run.stdout)
    assert seen["violations"] == {} and seen["differing_files"] == []
    engines, coordinator = seen["phases"]["engines killed"], seen["phases"]["coordinator killed"]
    assert [kill["running"] > 0 for kill in engines["kills"] + coordinator["kills"]] == [True, True]
    assert engines["streams"]["whole"] > 0 and engines["streams"]["cut"] == 0
    assert coordinator["streams"]["cut"] > 0
    assert engines["batch_lines"] >= 20 and coordinator["batch_lines"] >= 20
    assert seen["positions"] > 1000 and seen["ties"] == 0
    assert seen["replayed_files"] == 4  # the coordinator's, and those of three engines


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    run = chaos(tmp_path)
    assert run.returncode == 2
    assert "is not empty" in run.stderr


def of_stream(tokens: Sequence[int], *, error: str = "", cut: bool = False, counted: int = -1) -> list[str]:
    """Kinds of violations."""
    checks = Checks([EXPECTED])
    count = len(tokens) if counted < 0 else counted
    stream = Stream(ASKED, list(tokens), not error and count > 0, count, error, cut)
    checks.streams("test", [stream])
    return [kind for kind, _ in checks.violations]


def test_streams_are_whole_or_cut_by_a_kill() -> None:
    assert of_stream(EXPECTED) == []
    assert of_stream(EXPECTED[:3], error=CUT, cut=True) == []
    assert of_stream(EXPECTED, cut=True) == []
    assert of_stream(EXPECTED[:3], error=CUT) == ["lost", "failed"]
    assert of_stream(EXPECTED[:3], error="INTERNAL: a bug", cut=True) == ["failed"]
    assert of_stream(EXPECTED[:3], cut=True, counted=0) == ["unclean end"]
    assert of_stream(EXPECTED[:3], cut=True) == ["lost"]
    assert of_stream(EXPECTED, counted=5) == ["lost"]


def test_tokens_that_are_lost_doubled_or_others_are_found() -> None:
    assert of_stream(EXPECTED[:5]) == ["lost"]
    assert of_stream([*EXPECTED, 15]) == ["doubled"]
    assert of_stream([10, 11, 11, 12, 13], error=CUT, cut=True) == ["doubled"]
    assert of_stream([10, 12, 13], error=CUT, cut=True) == ["lost"]
    assert of_stream([10, 11, 12, 99, 14, 15]) == ["differs"]
    assert kind_of(EXPECTED, [10, 11, 10, 11, 12, 13], 2) == "doubled"


def of_batch(*results: tuple[int, list[int]]) -> list[str]:
    checks = Checks([EXPECTED])
    told = [
        batch_pb2.LineResult(line_no=number, output=inference_pb2.GenerateChunk(token_ids=tokens))
        for number, tokens in results
    ]
    checks.batch("test", Batch("b", [ASKED, ASKED]), told)
    return [kind for kind, _ in checks.violations]


def test_a_batch_line_has_one_result() -> None:
    assert of_batch((0, EXPECTED), (1, EXPECTED)) == []
    assert of_batch((0, EXPECTED)) == ["lost"]
    assert of_batch((0, EXPECTED), (0, EXPECTED), (1, EXPECTED)) == ["doubled"]
    assert of_batch((0, EXPECTED), (1, EXPECTED[:4])) == ["lost"]
    failed = batch_pb2.LineResult(line_no=0, error=batch_pb2.LineError(code="engine_lost"))
    checks = Checks([EXPECTED])
    checks.batch("test", Batch("b", [ASKED]), [failed])
    assert [kind for kind, _ in checks.violations] == ["failed"]


def test_ties_are_counted_and_too_many_are_a_violation() -> None:
    checks = Checks([EXPECTED], lambda asked, tokens, position: 1)
    for _ in range(17):
        checks.streams("test", [Stream(ASKED, list(EXPECTED), True, 6)])
    checks.streams("test", [Stream(ASKED, [*EXPECTED[:5], 99], True, 6)])
    checks.finish()
    assert (checks.positions, checks.ties, checks.violations) == (108, 1, [])
    checks.streams("test", [Stream(ASKED, [*EXPECTED[:5], 99], True, 6)])
    checks.finish()
    assert [kind for kind, _ in checks.violations] == ["ties"]


def test_the_judge_tells_ties_from_wrong_tokens(tiny_llama: Path) -> None:
    """Against tokens of our own engine; a token with a twin of equal weights is as good as it."""
    asked = Asked(0, (72, 101, 108, 108, 111), 8)
    with LLM(str(tiny_llama), dtype="float32", max_num_seqs=2, threads=1) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=asked.max_tokens, ignore_eos=True)
        (output,) = llm.generate([asked.prompt_ids], greedy)
    judge = LogitJudge(tiny_llama)
    expected = list(output.token_ids)
    assert max(judge.shortfalls(asked, expected)) < 1e-3
    unused = next(token for token in range(200) if token not in {*expected, *asked.prompt_ids})
    other = [*expected[:4], unused, *expected[5:]]
    assert judge.ties([expected], asked, other, 4) is None

    twins = LogitJudge(tiny_llama)
    weights = twins._model.get_input_embeddings().weight
    with torch.no_grad():
        weights[unused] = weights[expected[4]]
    assert twins.ties([expected], asked, other, 4) == 1
    assert twins.ties([expected], asked, [*other[:-1], (other[-1] + 1) % 200], 4) is None
