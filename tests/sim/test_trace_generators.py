"""Generated traces: rates, burstiness and lengths as asked for, the same for the same seed."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import pytest

from chiron_engine.sim.traces.checks import TraceError
from chiron_engine.sim.traces.generate import generate_trace, parse_spec
from chiron_engine.sim.traces.load import load_trace

SPECS = [
    "poisson:rate=5,duration=400,lengths=100/10",
    "gamma:rate=5,cv=4,duration=400,lengths=100/10",
    "spike:rate=2,factor=3,start=50,width=10,every=100,duration=400",
    "step:rate=2,factor=2,at=100,duration=400",
    "diurnal:rate=3,period=200,duration=400",
    "burst:count=500,at=7,over=3",
]


def arrivals(spec: str, seed: int = 1) -> np.ndarray:
    return np.asarray(generate_trace(spec, seed).arrival_s)


@pytest.mark.parametrize("spec", SPECS)
def test_a_trace_is_sorted_and_repeats_by_its_seed(spec: str) -> None:
    trace = load_trace(spec, seed=5)
    assert trace.arrival_s == array("d", sorted(trace.arrival_s))
    assert min(trace.prompt_tokens) > 0 and min(trace.output_tokens) > 0
    again, other = load_trace(spec, seed=5), load_trace(spec, seed=6)
    assert (again.arrival_s, again.prompt_tokens) == (trace.arrival_s, trace.prompt_tokens)
    assert other.arrival_s != trace.arrival_s


@pytest.mark.parametrize(("cv", "tolerance"), [(0.5, 0.05), (1.0, 0.05), (4.0, 0.25)])
def test_gaps_have_the_rate_and_variation_asked_for(cv: float, tolerance: float) -> None:
    times = arrivals(f"gamma:rate=20,cv={cv},duration=5000,lengths=1/1")
    gaps = np.diff(times)
    assert len(times) == pytest.approx(100_000, rel=0.05 * max(1, cv))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=tolerance)


def test_no_variation_is_even_spacing() -> None:
    assert list(arrivals("gamma:rate=2,cv=0,duration=3,lengths=1/1")) == pytest.approx(
        [0.5, 1, 1.5, 2, 2.5, 3]
    )


def rate_between(times: np.ndarray, start: float, end: float) -> float:
    return float(np.mean((times >= start) & (times < end)) * len(times) / (end - start))


def test_spikes_come_when_and_as_high_as_asked() -> None:
    times = arrivals("spike:rate=50,factor=3,start=100,width=20,every=200,duration=400,lengths=1/1")
    assert rate_between(times, 100, 120) == pytest.approx(150, rel=0.1)
    assert rate_between(times, 300, 320) == pytest.approx(150, rel=0.1)
    assert rate_between(times, 120, 300) == pytest.approx(50, rel=0.1)


def test_a_step_stays() -> None:
    times = arrivals("step:rate=50,factor=1.5,at=100,duration=400,lengths=1/1")
    assert rate_between(times, 0, 100) == pytest.approx(50, rel=0.1)
    assert rate_between(times, 100, 400) == pytest.approx(75, rel=0.1)


def test_a_day_is_lowest_at_its_start() -> None:
    times = arrivals("diurnal:rate=50,amplitude=0.8,period=400,duration=800,lengths=1/1")
    assert len(times) == pytest.approx(40_000, rel=0.03)
    assert rate_between(times, 390, 410) == pytest.approx(10, rel=0.4)
    assert rate_between(times, 190, 210) == pytest.approx(90, rel=0.1)


def test_a_burst_comes_at_once() -> None:
    assert set(arrivals("burst:count=1000,at=300,lengths=8/2")) == {300.0}
    spread = arrivals("burst:count=1000,at=300,over=60,lengths=8/2")
    assert len(spread) == 1000 and 300 <= spread.min() < 301 and 359 < spread.max() <= 360


def test_lengths_are_drawn_in_pairs(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("prompt_tokens,output_tokens\n10,1\n20,2\n30,3\n")
    trace = generate_trace(f"poisson:rate=10,duration=100,lengths={file}", 0)
    pairs = set(zip(trace.prompt_tokens, trace.output_tokens, strict=True))
    assert pairs == {(10, 1), (20, 2), (30, 3)}
    assert set(generate_trace("burst:count=9,lengths=512/128", 0).prompt_tokens) == {512}
    mean = np.mean(generate_trace("poisson:rate=30,lengths=azure-conv", 0).prompt_tokens)
    assert mean == pytest.approx(1154.7, rel=0.02)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("poisson:", ["rate is missing", "takes rate, duration, lengths"]),
        ("gamma:rate=3", ["cv is missing"]),
        ("poisson:rate=3,burst=4", ["unknown option 'burst=4'"]),
        ("poisson:rate=3,rate=4", ["given twice"]),
        ("poisson:rate=3,lengths=5/5,lengths=6/6", ["lengths is given twice"]),
        ("poisson:rate=1e300", ["about 3.6e+303 requests"]),
        ("poisson:rate=-3", ["rate is '-3'", "over 0"]),
        ("poisson:rate=nan", ["rate is 'nan'"]),
        ("gamma:rate=3,cv=1000", ["cv is 1000", "0 to 100"]),
        ("step:rate=3,factor=2,at=5000", ["at is 5000", "duration of 3600 s"]),
        ("spike:rate=3,factor=2,start=1,width=20,every=10", ["overlap"]),
        ("spike:rate=3,factor=2,start=1,width=1e-9,every=1e-8", ["spikes"]),
        ("diurnal:rate=3,amplitude=2", ["amplitude is 2"]),
        ("burst:count=2.5", ["whole number"]),
        ("burst:count=1e12", ["at most 20,000,000"]),
        ("poisson:rate=1e-9,duration=1", ["no request arrived"]),
        ("poisson:rate=3,lengths=nothing", ["unknown lengths 'nothing'", "azure-conv", "512/128"]),
        ("poisson:rate=3,lengths=0/5", ["from 1"]),
    ],
)
def test_bad_specs(spec: str, parts: list[str]) -> None:
    with pytest.raises(TraceError) as error:
        load_trace(spec)
    assert all(part in str(error.value) for part in parts)


def test_a_burst_has_the_packaged_lengths_unless_told() -> None:
    assert parse_spec("burst:count=1000000,at=300").lengths == "azure-conv"
