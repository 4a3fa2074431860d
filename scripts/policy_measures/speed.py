"""Speed of the simulator on one core: seconds and memory of the Azure hour, cost by fleet size."""

from __future__ import annotations

import resource
import sys

from .measure import Measured, Options, rate_for, run, workload_of

LOAD = 10.0
SECONDS = 300.0
GIGABYTES = 4.0
SIZES = (10, 100, 1000)
REQUESTS = 200_000
LEAST_REQUESTS = 50_000
"""Of each fleet size, at any scale: with fewer, most of 1,000 instances would see none."""
UTILISATION = 0.6
FLAT = 1.25


def measure(options: Options) -> Measured:
    """First the Azure hour, with all the time of the run itself: reading and scaling the trace and the
    lower bound are not in it. Then the same number of short requests on fixed fleets of 10 to 1,000
    instances at equal utilisation."""
    measured = Measured()
    load = LOAD * options.scale
    workload = workload_of(options, "azure-conv", None, load)
    (done,) = run(options, workload, ("chiron",), options.settings(load), bound=False)[:1]
    name = measured.add(done, "Azure hour")
    wall_s = done.summary["wall_s"]
    requests = done.summary["requests"]
    seen = f"{wall_s:.0f} s for {requests:,} requests, {1e6 * wall_s / requests:.0f} us each"
    measured.judge(name, f"within {SECONDS * options.scale:g} s", seen, wall_s <= SECONDS * options.scale)
    memory = peak_gigabytes()
    measured.judge(name, f"peak memory under {GIGABYTES:g} GB", f"{memory:.2f} GB", memory < GIGABYTES)
    del done, workload
    _by_size(options, measured)
    return measured


def _by_size(options: Options, measured: Measured) -> None:
    count = max(LEAST_REQUESTS, round(REQUESTS * options.scale))
    measured.notes.append(
        f"by fleet size: {count:,} requests of 256 prompt and 16 output tokens, at {UTILISATION:g} of what "
        f"each fleet can do"
    )
    costs = {}
    for size in SIZES:
        rate = rate_for(options, "256/16", UTILISATION * size)
        workload = workload_of(options, f"burst:count={count},over={count / rate:g},lengths=256/16")
        (done,) = run(
            options.with_policies(f"static:{size}"), workload, (), options.settings(size), bound=False
        )
        costs[size] = done.summary["wall_s"] / done.summary["requests"]
        measured.add(done, f"{size} instances", **{"us a\nrequest": f"{1e6 * costs[size]:.0f}"})
    ratio = max(costs.values()) / costs[SIZES[0]]
    seen = ", ".join(f"{1e6 * cost:.0f} us at {size}" for size, cost in costs.items())
    measured.judge("by fleet size", f"cost per request within {FLAT:g} x that at 10", seen, ratio <= FLAT)


def peak_gigabytes() -> float:
    """Of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1.0 if sys.platform == "darwin" else 1024.0) / 1e9
