"""Generated traces, named by a short spec such as `gamma:rate=30,cv=4,duration=3600,lengths=azure-conv`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .arrivals import RateCurve, constant_rate, diurnal_rate, draw_arrivals, spike_rate, step_rate
from .checks import TraceError
from .columns import Floats, make_trace
from .lengths import load_lengths
from .trace import Trace

MAX_REQUESTS = 20_000_000
DEFAULT_LENGTHS = "azure-conv"

# Options by kind with their defaults; None must be given. Rates in requests a second, times in seconds.
KINDS: dict[str, dict[str, float | None]] = {
    "poisson": {"rate": None, "duration": 3600.0},
    "gamma": {"rate": None, "cv": None, "duration": 3600.0},
    "spike": {
        "rate": None,
        "factor": None,
        "start": None,
        "width": None,
        "every": math.inf,
        "cv": 1.0,
        "duration": 3600.0,
    },
    "step": {"rate": None, "factor": None, "at": None, "cv": 1.0, "duration": 3600.0},
    "diurnal": {"rate": None, "amplitude": 0.5, "period": 86400.0, "cv": 1.0, "duration": 86400.0},
    "burst": {"count": None, "at": 0.0, "over": 0.0},
}
_CURVES: dict[str, Callable[..., RateCurve]] = {
    "poisson": constant_rate,
    "gamma": constant_rate,
    "spike": spike_rate,
    "step": step_rate,
    "diurnal": diurnal_rate,
}
_POSITIVE = {"rate", "duration", "count", "period", "width", "every"}


@dataclass(frozen=True, slots=True)
class TraceSpec:
    """A spec taken apart: numbers by option, complete."""

    text: str
    kind: str
    options: dict[str, float]
    lengths: str


def is_generated(spec: str) -> bool:
    return spec.split(":")[0] in KINDS


def generate_trace(spec: str, seed: int) -> Trace:
    """`KIND:option=number,...[,lengths=NAME]`. Kinds: `poisson` (rate), `gamma` (rate, cv of the gaps),
    `spike` (rate, factor, start, width[, every]), `step` (rate, factor, at), `diurnal` (rate[, amplitude,
    period]), each for `duration` seconds, and `burst` (count requests at `at`, or evenly at random over
    `over` seconds after it). `cv` bends the burstiness of spike, step and diurnal, too. `lengths` as in
    `load_lengths`. The same spec and seed give the same trace. Raises TraceError."""
    parsed = parse_spec(spec)
    lengths = load_lengths(parsed.lengths)
    rng = np.random.default_rng(seed)
    arrivals = _arrivals(parsed, rng)
    if not len(arrivals):
        raise TraceError(f"{spec}: no request arrived; raise rate or duration")
    prompts, outputs = lengths.draw(len(arrivals), rng)
    return make_trace(spec, arrivals, prompts, outputs)


def parse_spec(spec: str) -> TraceSpec:
    """Raises TraceError that names what is unknown, missing or out of range."""
    kind, _, rest = spec.partition(":")
    known = KINDS[kind]
    given: dict[str, float] = {}
    lengths: str | None = None
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals or (option not in known and option != "lengths"):
            raise TraceError(f"{spec}: unknown option {part!r}; {kind} takes {_usage(kind)}")
        if option in given or (option == "lengths" and lengths is not None):
            raise TraceError(f"{spec}: {option} is given twice")
        if option == "lengths":
            lengths = value
        else:
            given[option] = _number(spec, option, value)
    missing = [option for option, default in known.items() if default is None and option not in given]
    if missing:
        raise TraceError(f"{spec}: {', '.join(missing)} is missing; {kind} takes {_usage(kind)}")
    defaults = {option: default for option, default in known.items() if default is not None}
    parsed = TraceSpec(spec, kind, defaults | given, DEFAULT_LENGTHS if lengths is None else lengths)
    _check_ranges(parsed)
    return parsed


def _number(spec: str, option: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0 or (option in _POSITIVE and number == 0):
        right = "a number over 0" if option in _POSITIVE else "a number, 0 or more"
        raise TraceError(f"{spec}: {option} is {value!r}; give {right}")
    return number


def _check_ranges(parsed: TraceSpec) -> None:
    options = parsed.options
    for option in {"start", "at"} & options.keys():
        if "duration" in options and options[option] >= options["duration"]:
            raise TraceError(
                f"{parsed.text}: {option} is {options[option]:g}, which is not within the duration of"
                f" {options['duration']:g} s"
            )
    if options.get("amplitude", 0) > 1:
        raise TraceError(f"{parsed.text}: amplitude is {options['amplitude']:g}; give 0 to 1")
    if options.get("every", math.inf) <= options.get("width", 0):
        raise TraceError(f"{parsed.text}: spikes every {options['every']:g} s overlap; give more than width")
    if options.get("cv", 1) > 100:
        raise TraceError(f"{parsed.text}: cv is {options['cv']:g}; give 0 to 100")
    if parsed.kind == "burst" and options["count"] != int(options["count"]):
        raise TraceError(f"{parsed.text}: count is {options['count']:g}; give a whole number")
    if _duration_steps(options) > MAX_REQUESTS:
        raise TraceError(f"{parsed.text}: more than {MAX_REQUESTS:,} spikes or periods")
    expected = options["count"] if parsed.kind == "burst" else _curve(parsed).total
    if expected > MAX_REQUESTS:
        raise TraceError(
            f"{parsed.text}: about {expected:,.9g} requests; at most {MAX_REQUESTS:,} are possible"
        )


def _duration_steps(options: dict[str, float]) -> float:
    """How often something of the curve repeats; a diurnal period takes 1,000 points."""
    duration = options.get("duration", 0.0)
    return duration / options.get("every", math.inf) + 1000 * duration / options.get("period", math.inf)


def _curve(parsed: TraceSpec) -> RateCurve:
    arguments = {option: value for option, value in parsed.options.items() if option != "cv"}
    return _CURVES[parsed.kind](**arguments)


def _arrivals(parsed: TraceSpec, rng: np.random.Generator) -> Floats:
    options = parsed.options
    if parsed.kind == "burst":
        offsets = rng.uniform(0.0, options["over"], int(options["count"]))
        return options["at"] + np.sort(offsets)
    return draw_arrivals(_curve(parsed), options.get("cv", 1.0), rng)


def _usage(kind: str) -> str:
    return ", ".join([*KINDS[kind], "lengths"])
