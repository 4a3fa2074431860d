"""Microbenchmarks of the Triton kernels on a GPU: `python -m benchmarks.run`, with PYTHONPATH=.:kernels.

Writes microbenchmarks.json, .md and roofline.png under kernels/benchmarks/results/<device>/. Without a GPU it
prints the least times by bytes and operations, as estimates. --dry-run tries every case in a tiny shape, by
Triton's interpreter where there is no GPU, and times nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Goal
from benchmarks.measure import measure, missing_floats, missing_kernels, try_out
from benchmarks.peers import Peer, all_peers
from benchmarks.report import estimates, write_results
from benchmarks.results import CaseResult
from benchmarks.tables import all_cases
from benchmarks.timing import Ceilings, measure_ceilings
from scripts.gpu_suite.report import folder_name

RESULTS = Path(__file__).resolve().parent / "results"
FAILED = "FAILED"


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="try every case in a tiny shape, time nothing")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases with this in their name")
    parser.add_argument("--seconds", type=float, default=900, help="stop starting cases after this long")
    parser.add_argument("--no-peers", action="store_true", help="time our kernels alone")
    parser.add_argument("--out", type=Path, help="folder of the results, in place of the device's own")
    return parser.parse_args(words)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def reason_of(error: Exception) -> str:
    """In a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def dry_run(cases: Sequence[Case]) -> int:
    """1 if a case fails. One without its kernel is named, and is no failure."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        # Both before any kernel is imported, which the cases do as late as they can.
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.triton_interpreter import install

        install()
    failed = 0
    for case in cases:
        if missing := missing_kernels(case):
            say(f"not run: {case.name}: no kernel {', '.join(missing)}")
            continue
        if floats := missing_floats(case, device):
            say(f"not run: {case.name}: the GPU has no {floats}")
            continue
        try:
            say(f"tried: {case.name}: relative error {try_out(case, device):.1e}")
        except Exception as error:
            failed += 1
            say(f"{FAILED}: {case.name}: {reason_of(error)}")
    say(f"{len(cases)} cases, {failed} failed; nothing was timed")
    return 1 if failed else 0


def device_lives() -> bool:
    """Not after a kernel has read or written what is not there: then nothing runs in this process again."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    torch.cuda.empty_cache()
    return True


@dataclass(slots=True)
class Run:
    """results, and why the other cases have none. Both grow from case to case."""

    device: torch.device
    ceilings: Ceilings
    peers: Sequence[Peer]
    results: list[CaseResult] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    broken_by: str = ""

    @property
    def failed(self) -> bool:
        return any(reason.startswith(FAILED) for reason in self.not_run.values())

    def add(self, case: Case, deadline: float) -> None:
        """deadline: on time.monotonic's clock."""
        if missing := missing_kernels(case):
            self.not_run[case.name] = f"no kernel {', '.join(missing)}"
        elif floats := missing_floats(case, self.device):
            self.not_run[case.name] = f"the GPU has no {floats}"
        elif self.broken_by:
            self.not_run[case.name] = f"the device was lost in {self.broken_by}"
        elif time.monotonic() > deadline:
            self.not_run[case.name] = "out of time"
        else:
            self._measure(case)

    def _measure(self, case: Case) -> None:
        try:
            result = measure(case, self.device, self.ceilings, self.peers)
        except Exception as error:
            self.not_run[case.name] = f"{FAILED}: {reason_of(error)}"
            say(f"{case.name}: {self.not_run[case.name]}")
        else:
            self.results.append(replace(result, other=self._seconds_of(case.goal)))
            say(f"{case.name}: {result.measures['us']:,.1f} us")
        if not device_lives():
            self.broken_by = case.name

    def _seconds_of(self, goal: Goal | None) -> float | None:
        """Of the case that a goal is set against."""
        if goal is None:
            return None
        return next((r.timing.median for r in self.results if r.case.name == goal.than), None)


def describe(device: torch.device) -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_cache_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def draw(results: Sequence[CaseResult], ceilings: Ceilings, name: str, folder: Path) -> None:
    try:
        from benchmarks.plot import plot_roofline

        plot_roofline(results, ceilings, name, folder / "roofline.png")
    except ImportError as error:
        say(f"no roofline: {error}")


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(words)
    began = time.monotonic()
    cases = [case for case in all_cases() if arguments.only in case.name]
    if not cases:
        say(f"no case has {arguments.only!r} in its name")
        return 2
    if arguments.dry_run:
        return dry_run(cases)
    if not torch.cuda.is_available():
        print(estimates(cases))
        say("no CUDA device here: these are estimates")
        return 0
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    facts = describe(device)
    ceilings = measure_ceilings(device)
    folder = arguments.out or RESULTS / folder_name(facts["name"])
    run = Run(device, ceilings, [] if arguments.no_peers else all_peers())
    for case in cases:
        run.add(case, began + arguments.seconds)
        # After each, so that whoever ends this process has what was measured until then.
        write_results(facts, ceilings, run.results, run.not_run, folder)
    draw(run.results, ceilings, facts["name"], folder)
    say(f"{len(run.results)} cases in {time.monotonic() - began:.0f} s; results in {folder}")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
