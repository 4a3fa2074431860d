"""Compile every kernel ahead of time, as the engine would launch it, and judge the machine code.

Started by scripts/kernel_gate.sh. Needs no GPU. Ends with 1 where a kernel fails, 2 where it cannot begin.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import triton

from scripts.kernel_gate import baseline, report
from scripts.kernel_gate.case import Case, case_modules, load_cases
from scripts.kernel_gate.compiled import Compiled, Key, NotCompiled
from scripts.kernel_gate.judge import HOPPER, Fault, find_faults, find_stale
from scripts.kernel_gate.workers import ROOT, Task, Toolchain, compile_all

GPU_TRITON = Toolchain("3.6.0", ROOT / "build" / "triton-3.6")
"""That of torch 2.11, which GPU machines run. Put there by scripts/kernel_gate.sh."""

Cases = dict[str, dict[tuple[str, int], Case]]
"""By module, then name and architecture."""


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kernel_gate.sh", description=__doc__)
    parser.add_argument("--installed", action="store_true", help="with the environment's Triton alone")
    parser.add_argument("--sample", action="store_true", help="--installed, a case of each kernel, sm_90")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases with this in their name")
    parser.add_argument("--cases", action="append", metavar="MODULE", help="in place of every *_cases.py")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="compile N at once"
    )
    parser.add_argument("--update", action="store_true", help="write the sizes as the new baseline")
    parser.add_argument("--baseline", type=Path, default=baseline.PATH, help="in place of the committed one")
    parser.add_argument("--table", action="store_true", help="print a Markdown table of everything compiled")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything compiled there")
    arguments = parser.parse_args(words)
    if arguments.jobs < 1:
        parser.error(f"--jobs is {arguments.jobs}; it must be 1 or more")
    arguments.installed = arguments.installed or arguments.sample
    if arguments.update and arguments.installed:
        parser.error("--update needs every version of Triton; leave --installed and --sample out")
    return arguments


def find_toolchains(installed_only: bool) -> list[Toolchain]:
    """Raises FileNotFoundError where the one of GPU machines is wanted and missing."""
    installed = Toolchain(triton.__version__)
    if installed_only or installed.version == GPU_TRITON.version:
        return [installed]
    assert GPU_TRITON.path is not None
    if not (GPU_TRITON.path / f"triton-{GPU_TRITON.version}.dist-info").is_dir():
        raise FileNotFoundError(
            f"{GPU_TRITON.path} holds no Triton {GPU_TRITON.version}; scripts/kernel_gate.sh installs it"
        )
    return [installed, GPU_TRITON]


def select_cases(modules: Iterable[str], substring: str) -> Cases:
    """Raises ValueError for two cases of one name and architecture."""
    found = {module: load_cases(module) for module in modules}
    for one, other in itertools.combinations(found, 2):
        if both := found[one].keys() & found[other].keys():
            name, architecture = min(both)
            raise ValueError(f"{one} and {other} both have a case {name!r} for sm_{architecture}")
    return {
        module: {key: case for key, case in cases.items() if substring in case.name}
        for module, cases in found.items()
    }


def sample_of(cases: Cases) -> Cases:
    """The first case of each module that is for Hopper."""
    hopper = {
        module: [(key, case) for key, case in named.items() if key[1] == HOPPER]
        for module, named in cases.items()
    }
    return {module: dict(named[:1]) for module, named in hopper.items()}


def plan(cases: Cases, toolchains: Iterable[Toolchain]) -> list[Task]:
    return [
        Task(module, name, architecture, toolchain)
        for toolchain in toolchains
        for module, named in cases.items()
        for name, architecture in named
    ]


def judge_all(
    results: Iterable[Compiled | NotCompiled], cases: Cases, sizes: dict[Key, baseline.Size]
) -> list[Fault]:
    found = {key: case for named in cases.values() for key, case in named.items()}
    faults = []
    for result in results:
        if isinstance(result, NotCompiled):
            faults.append(Fault(result.key, f"does not compile: {result.reason}"))
        else:
            case = found[result.key.case, result.key.architecture]
            faults += find_faults(result, case, sizes.get(result.key))
    return faults


def say(text: str) -> None:
    print(f"kernel gate: {text}", file=sys.stderr)


def compile_and_tell(tasks: Sequence[Task], jobs: int) -> list[Compiled | NotCompiled]:
    began, told = time.monotonic(), 0

    def tell(_: Compiled | NotCompiled) -> None:
        nonlocal told
        told += 1
        if told % 100 == 0:
            say(f"{told} of {len(tasks)} compiled")

    results = compile_all(tasks, min(jobs, len(tasks)), tell)
    say(f"{len(results)} kernels in {time.monotonic() - began:.0f} s")
    return results


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(words)
    try:
        toolchains = find_toolchains(arguments.installed)
        cases = select_cases(arguments.cases or case_modules(), arguments.only)
        sizes = baseline.read_baseline(arguments.baseline)
    except (FileNotFoundError, ValueError) as error:
        say(str(error))
        return 2
    tasks = plan(sample_of(cases) if arguments.sample else cases, toolchains)
    if not tasks:
        say(f"no case has {arguments.only!r} in its name")
        return 2
    results = compile_and_tell(tasks, arguments.jobs)

    whole = not (arguments.installed or arguments.only or arguments.cases)
    if arguments.update:
        fresh = {result.key: baseline.size_of(result) for result in results if isinstance(result, Compiled)}
        sizes = fresh if whole else {**sizes, **fresh}
        baseline.write_baseline(arguments.baseline, sizes)
    faults = judge_all(results, cases, sizes)
    if whole:
        faults += find_stale(sizes, (task.key for task in tasks))

    if arguments.table:
        print(report.markdown(results))
    if arguments.json:
        arguments.json.write_text(report.as_json(results, faults), encoding="utf-8")
    for fault in faults:
        say(str(fault))
    say(f"{len(faults)} faults" if faults else "all kernels pass")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
