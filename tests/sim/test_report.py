"""The table that a person reads."""

from __future__ import annotations

import io

from chiron_engine.sim.report import cells, print_rows, print_table

SUMMARY = {
    "policy": "chiron",
    "slo_attainment": {"interactive": 0.98999, "batch": None},
    "ttft_s": {"p50": 0.1234, "p99": 1.5},
    "itl_ms": {"p50": 7.26, "p99": None},
    "gpu_hours": 12.5,
    "lower_bound_gpu_hours": 10.0,
    "peak_instances": 14,
    "scaling_actions": 3,
    "preemptions": 8,
    "throughput_rps": 40.125,
    "wall_s": 9.94,
}


def test_a_near_miss_does_not_read_as_met() -> None:
    row = list(cells(SUMMARY).values())
    assert row == [
        "chiron",
        "98.99",
        "-",
        "0.123 / 1.500",
        "7.3 / -",
        "12.50",
        "1.25",
        "14",
        "3",
        "8",
        "40.12",
        "9.9",
    ]


def test_without_a_bound_there_is_no_ratio() -> None:
    assert "1.25" not in cells({**SUMMARY, "lower_bound_gpu_hours": None}).values()


def test_no_figure_is_cut_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    print_table([SUMMARY, {**SUMMARY, "policy": "paper-literal [x]"}], out)
    text = out.getvalue()
    assert "paper-literal [x]" in text
    assert text.count("0.123 / 1.500") == 2
    assert "\x1b" not in text


def test_a_row_may_lack_a_column() -> None:
    out = io.StringIO()
    print_rows([{"run": "a", "one": "1"}, {"run": "b", "one": "2", "more": "3"}], out)
    header, _, first, second, *_ = [line for line in out.getvalue().splitlines() if line.strip()]
    assert header.split() == ["run", "one", "more"]
    assert first.split() == ["a", "1"]
    assert second.split() == ["b", "2", "3"]
