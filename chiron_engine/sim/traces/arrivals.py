"""Times of generated arrivals: a renewal process of any burstiness, bent by a rate that varies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .columns import Floats


@dataclass(frozen=True, slots=True)
class RateCurve:
    """A rate over time, between corner points: `seconds` (rising, from 0) and `expected`, the mean
    number of arrivals up to each. In between the rate is constant."""

    seconds: Floats
    expected: Floats

    @classmethod
    def of_pieces(cls, edges: list[float], rates: list[float]) -> RateCurve:
        """rates[i] per second holds from edges[i] to edges[i + 1]."""
        seconds = np.asarray(edges, dtype=np.float64)
        expected = np.concatenate(([0.0], np.cumsum(np.diff(seconds) * rates)))
        return cls(seconds, expected)

    @property
    def total(self) -> float:
        return float(self.expected[-1])


def constant_rate(rate: float, duration: float) -> RateCurve:
    return RateCurve.of_pieces([0.0, duration], [rate])


def step_rate(rate: float, factor: float, at: float, duration: float) -> RateCurve:
    """`rate`, from `at` on times `factor`."""
    at = min(at, duration)
    return RateCurve.of_pieces([0.0, at, duration], [rate, rate * factor])


def spike_rate(
    rate: float, factor: float, start: float, width: float, every: float, duration: float
) -> RateCurve:
    """`rate`, times `factor` for `width` seconds from `start` on and then every `every` seconds."""
    edges, rates = [0.0], []
    begin = start
    while begin < duration:
        end = min(begin + width, duration)
        edges += [begin, end]
        rates += [rate, rate * factor]
        begin += every
    return RateCurve.of_pieces([*edges, duration], [*rates, rate])


def diurnal_rate(rate: float, amplitude: float, period: float, duration: float) -> RateCurve:
    """rate x (1 - amplitude x cos(2 pi t / period)): mean `rate`, lowest at the start."""
    points = 1 + max(1000, math.ceil(1000 * duration / period))
    seconds = np.linspace(0.0, duration, points)
    swing = period / (2 * math.pi) * np.sin(2 * math.pi * seconds / period)
    return RateCurve(seconds, rate * (seconds - amplitude * swing))


def draw_arrivals(curve: RateCurve, cv: float, rng: np.random.Generator) -> Floats:
    """Arrivals along the curve, sorted. Gaps are Gamma distributed in units of expected arrivals, with
    coefficient of variation `cv`: 1 is a Poisson process (inhomogeneous where the rate varies), less is
    more regular, more comes in bursts, 0 is evenly spaced."""
    marks = _renewals(curve.total, cv, rng)
    return np.interp(marks, curve.expected, curve.seconds)


def _renewals(total: float, cv: float, rng: np.random.Generator) -> Floats:
    """Points of a renewal process of mean gap 1 in (0, total]."""
    if cv == 0:
        return np.arange(1.0, total + 1e-9)
    shape = 1.0 / cv**2
    chunks, reached = [], 0.0
    while reached <= total:
        left = total - reached
        count = int(left + 4 * cv * math.sqrt(left) + 16)
        marks = reached + np.cumsum(rng.gamma(shape, 1.0 / shape, count))
        chunks.append(marks)
        reached = float(marks[-1])
    marks = np.concatenate(chunks)
    return marks[: np.searchsorted(marks, total, side="right")]
