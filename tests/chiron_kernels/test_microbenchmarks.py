"""The microbenchmarks as far as they need no GPU: what they would time, and what they make of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.attention import AttentionCase
from benchmarks.attention_inputs import AttentionInputs, Request, exact_attention, make_inputs
from benchmarks.case import Goal, Prepared, Work, relative_error
from benchmarks.measure import (
    WrongResult,
    alternatives,
    checked,
    measure_peer,
    missing_floats,
    missing_kernels,
)
from benchmarks.norm import NormCase
from benchmarks.peers import all_peers, is_installed, torch_sdpa
from benchmarks.plot import plot_roofline
from benchmarks.report import H100, estimates, falling_steps, markdown, write_results
from benchmarks.results import CaseResult, PeerResult
from benchmarks.run import Run
from benchmarks.tables import all_cases, sweep_name
from benchmarks.timing import Ceilings, Timing

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NORM = NormCase(name="norm", rows=1000, width=1000, goal=Goal(80, "% of copy"))
FACTS = {"name": "a device", "torch": "2.11", "triton": "3.6.0"}


def case_named(start: str) -> AttentionCase:
    return next(case for case in all_cases() if case.name.startswith(start))


def inputs(requests: tuple[Request, ...], **changes: int) -> AttentionInputs:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 16, "block_size": 4, "layers": 3, **changes}
    return make_inputs(requests, **shape, device=CPU)


def test_names_are_unique() -> None:
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("start", "megabytes", "gigaflops"),
    [
        # 32 requests of 4,096 keys of 8 heads of 128, and 32 rows of 32 heads in and out, of 2 bytes each
        ("D6", (32 * 4096 * 2 * 8 * 128 + 2 * 32 * 32 * 128) * 2e-6, 4 * 32 * 128 * 32 * 4096e-9),
        ("D14", (16 * 8192 * 2 * 8 * 128 + 2 * 64 * 32 * 128) * 2e-6, 4 * 4096e-9 * 16 * (4 * 8192 - 6)),
        ("D15", (16 * 4096 * 2 * 8 * 128 + 2 * 16 * 32 * 128) * 2e-6, 4 * 4096e-9 * 16 * 4096),
        ("D16", ((8192 + 64 * 256) * 2 * 8 * 128 + 2 * 64 * 4096) * 2e-6, 4 * 4096e-9 * 64 * 8448),
        ("P1", (2048 * 2 * 8 * 128 + 2 * 2048 * 4096) * 2e-6, 4 * 4096e-9 * 2048 * 2049 / 2),
        ("P5", (10240 * 2 * 1024 + 2 * 2048 * 4096) * 2e-6, 4 * 4096e-9 * (2048 * 8192 + 2048 * 2049 / 2)),
    ],
)
def test_the_least_work_of_attention(start: str, megabytes: float, gigaflops: float) -> None:
    work = case_named(start).work()
    assert work.bytes / 1e6 == pytest.approx(megabytes)
    assert work.flops / 1e9 == pytest.approx(gigaflops)


def test_a_tiny_case_does_less_of_the_same() -> None:
    for case in all_cases():
        tiny = case.tiny()
        assert tiny.kernels == case.kernels
        assert tiny.work().bytes <= min(case.work().bytes, 2_000_000)


def test_a_pool_is_laid_out_as_the_engine_does() -> None:
    paged = inputs((Request(1, 9), Request(1, 12), Request(1, 3)), shared=0)
    layer = paged.layers[1]
    assert layer.shape[1:] == (4, 2, 2, 16)
    assert layer.stride() == (3 * 4 * 2 * 2 * 16, 2 * 2 * 16, 2 * 16, 16, 1)
    counts = (3, 4, 1)
    used = [block for row, count in zip(paged.tables.tolist(), counts, strict=True) for block in row[:count]]
    assert sorted(used) == list(range(1, 9))
    assert used != sorted(used)
    assert paged.tables[2, 1:].tolist() == [0, 0, 0]
    assert not torch.equal(paged.layers[0], paged.layers[1])


def test_a_shared_prefix_lies_in_the_same_blocks() -> None:
    tables = inputs((Request(1, 11), Request(1, 15)), shared=8).tables
    assert torch.equal(tables[0, :2], tables[1, :2])
    own = torch.cat((tables[0, 2:3], tables[1, 2:4]))
    assert len({*own.tolist(), *tables[0, :2].tolist()}) == 5


@pytest.mark.parametrize("window", [None, 1, 5])
def test_exact_attention_is_a_masked_softmax(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 16, generator=generator)
    kv = torch.randn(9, 2, 2, 16, generator=generator)
    position, key = torch.arange(6, 9)[:, None], torch.arange(9)[None, :]
    seen = (key <= position) & (key > position - (window or 9))
    keys, values = kv.repeat_interleave(2, 2).transpose(0, 2).unbind(1)
    right = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), keys, values, attn_mask=seen, scale=0.3
    )
    torch.testing.assert_close(exact_attention(q, kv, 0.3, window), right.transpose(0, 1))


@pytest.mark.parametrize("requests", [(Request(1, 20),) * 3, (Request(6, 7),) * 2, (Request(5, 0),)])
def test_torch_as_a_peer_gives_the_same(requests: tuple[Request, ...]) -> None:
    paged = inputs(requests)
    calls = torch_sdpa.prepare(paged)
    for layer, call in enumerate(calls):
        assert paged.error(layer, call()) < 8e-3
    assert paged.error(0, calls[1]()) > 0.1


def test_a_peer_that_cannot_is_named_with_the_reason() -> None:
    mixed = inputs((Request(1, 20), Request(1, 3)))
    prepared = Prepared([], mixed.error, 8e-3, mixed)
    assert measure_peer(torch_sdpa, prepared).reason == "does not do requests of different lengths"
    for peer in all_peers():
        if not is_installed(peer):
            assert measure_peer(peer, prepared).reason == f"{peer.PACKAGE} is not installed"


@pytest.mark.parametrize("wrong", [0.0, float("nan")])
def test_a_wrong_result_is_not_timed(wrong: float) -> None:
    right = torch.ones(4)
    prepared = Prepared(
        [lambda: torch.full((4,), wrong)], lambda _, result: relative_error(result, right), 1e-2
    )
    with pytest.raises(WrongResult, match=r"limit 1\.0e-02"):
        checked(prepared)


def test_a_kernel_that_is_not_there_is_named() -> None:
    case = replace(NORM, kernels=("norm", "no_such_kernel"))
    assert missing_kernels(case) == ["no_such_kernel"]
    run = Run(CPU, H100, [])
    run.add(case, time.monotonic() + 60)
    assert run.not_run == {"norm": "no kernel no_such_kernel"}
    assert not run.failed


def test_a_gpu_without_8_bits_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    a100 = torch.device("cuda", 0)
    assert not missing_floats(case_named("D6"), a100)
    run = Run(a100, H100, [])
    run.add(case_named("8 bits: D6"), time.monotonic() + 60)
    (reason,) = run.not_run.values()
    assert reason == "the GPU has no float8_e4m3fn" and not run.failed


def test_out_of_time_is_said() -> None:
    run = Run(CPU, H100, [])
    run.add(NORM, time.monotonic() - 1)
    assert run.not_run == {"norm": "out of time"}


@pytest.mark.parametrize(
    ("goal", "reached"),
    [
        (Goal(49, "% of copy"), True),
        (Goal(51, "% of copy"), False),
        (Goal(10, "us"), True),
        (Goal(9, "us"), False),
        (Goal(999, "GB/s"), True),
        (Goal(3, "TFLOP/s"), False),
        (None, None),
    ],
)
def test_goals(goal: Goal | None, reached: bool | None) -> None:
    result = CaseResult(
        replace(NORM, goal=goal),
        Work(bytes=10_000_000, flops=20_000_000),
        Timing(10e-6, 9e-6, 11e-6),
        0.0,
        Ceilings(2e12, 1e15, 1e10),
    )
    assert result.measures == pytest.approx({"us": 10, "GB/s": 1000, "% of copy": 50, "TFLOP/s": 2})
    assert result.reached is reached


def test_a_goal_against_another_case_is_of_the_same_run() -> None:
    case = replace(case_named("8 bits: D6"), goal=Goal(1.6, "x", "D6"))
    result = CaseResult(case, case.work(), Timing(1e-4, 1e-4, 1e-4), 0.0, H100)
    assert result.reached is None and "not timed in this run" in markdown(FACTS, H100, [result], {})
    assert replace(result, other=1.7e-4).reached and not replace(result, other=1.5e-4).reached
    page = markdown(FACTS, H100, [replace(result, other=1.7e-4)], {})
    assert "1.6 times as quick as D6: reached (1.70)" in page
    run = Run(CPU, H100, [], results=[replace(result, case=case_named("D6"))])
    assert run._seconds_of(Goal(1.6, "x", run.results[0].case.name)) == 1e-4
    assert run._seconds_of(Goal(1.6, "x", "D7")) is None


def test_8_bits_halve_the_bytes_of_keys_and_values() -> None:
    for case in all_cases():
        if isinstance(case, AttentionCase) and case.kv_dtype == torch.float8_e4m3fn:
            (wide,) = (other for other in all_cases() if f"8 bits: {other.name}" == case.name)
            rows = 2 * case.heads * case.head_dim * 2 * sum(request.tokens for request in case.requests)
            assert 2 * (case.work().bytes - rows) == wide.work().bytes - rows
            assert case.goal is None or case.goal.than == wide.name


def test_a_goal_beside_another_kernel() -> None:
    def result(seconds: float | None) -> CaseResult:
        case = replace(NORM, goal=Goal(5, "x decode_attention"))
        work, timing = Work(bytes=10_000_000), Timing(10e-6, 9e-6, 11e-6)
        return CaseResult(case, work, timing, 0.0, H100, [PeerResult("decode_attention", seconds)])

    assert result(51e-6).reached is True and result(49e-6).reached is False
    assert result(51e-6).measures["x decode_attention"] == pytest.approx(5.1)


def test_another_kernel_is_tried_as_well() -> None:
    prepared = case_named("D16").tiny().prepare(CPU, 1)
    assert list(prepared.alternatives) == ["decode_attention"]
    zeros = {"other": [lambda: torch.zeros(4)]}
    ones = Prepared([lambda: torch.ones(4)], lambda _, x: relative_error(x, torch.ones(4)), 1e-2, None, zeros)
    (other,) = alternatives(ones).values()
    assert checked(ones) == 0.0
    with pytest.raises(WrongResult, match=r"relative error 1\.0e\+00"):
        checked(other)


def test_the_results_are_written(tmp_path: Path) -> None:
    peers = [PeerResult("fast", 5e-6), PeerResult("absent", reason="absent is not installed")]
    ceilings = Ceilings(2e12, 1e15, 1e10)
    work = Work(bytes=10_000_000, flops=20_000_000)
    result = CaseResult(NORM, work, Timing(10e-6, 9e-6, 11e-6), 1e-3, ceilings, peers)
    not_run = {"other": "no kernel other"}
    write_results(FACTS, ceilings, [result], not_run, tmp_path)
    page = (tmp_path / "microbenchmarks.md").read_text()
    assert page == markdown(FACTS, ceilings, [result], not_run)
    cells = "10.0 | 1,000 | 50 | 2 | 1.0e-03 | 80 % of copy: missed"
    assert f"| norm | {cells} | fast 0.50, absent (absent is not installed) |" in page
    assert "- other: no kernel other" in page
    written = json.loads((tmp_path / "microbenchmarks.json").read_text())
    assert written["cases"][0]["peers"][0]["ratio"] == 0.5
    plot_roofline([result], ceilings, "a device", tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_down_in_a_sweep_is_told() -> None:
    def result(requests: int, keys: int, gb_per_s: float) -> CaseResult:
        seconds = 1e-3 / gb_per_s
        case = replace(NORM, name=sweep_name(requests, keys))
        return CaseResult(case, Work(bytes=1_000_000), Timing(seconds, seconds, seconds), 0.0, H100)

    results = [result(1, 4096, 500), result(4, 4096, 1900), result(8, 4096, 1600), result(16, 4096, 1200)]
    assert falling_steps(results) == ["D17 8 x 4096 page 16: 1,600 GB/s; D17 16 x 4096 page 16: 1,200 GB/s"]
    assert "## Steps down in a sweep" in markdown(FACTS, H100, results, {})
    assert falling_steps(results[:3]) == []


def test_estimates_say_that_they_are() -> None:
    page = estimates([case_named("D6"), case_named("P2"), case_named("C3")])
    assert "estimates, nothing was measured" in page
    floors = [
        line.split(" | ")[3:5] for line in page.splitlines() if line.startswith(("| D6", "| P2", "| C3"))
    ]
    assert floors == [["179.1", "bytes"], ["689.0", "operations"], ["335.5", "bus"]]


def test_cases_are_tried_by_the_interpreter() -> None:
    command = [sys.executable, "-m", "benchmarks.run", "--dry-run", "--only", "E3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "tried: E3 add and norm, 64 rows of 4096: relative error" in done.stderr
    assert "1 cases, 0 failed; nothing was timed" in done.stderr
