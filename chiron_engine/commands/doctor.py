"""`chiron doctor`: what this machine has, and what would keep an engine from running on it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from chiron_engine import __version__

from .exits import ExitCode
from .host_checks import FAIL, OK, WARN, Check, run_checks

MARKS = {OK: "ok  ", WARN: "warn", FAIL: "FAIL"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    port: Annotated[list[int] | None, typer.Option(help="Ports to look at (50051).")] = None,
) -> None:
    """Check this machine: Python, torch, CPU, GPU, memory, disk, ports and versions.

    Exits with 1 if something keeps an engine from running.
    """
    checks = run_checks(port or [50051])
    if as_json:
        summary = {"version": __version__, "ok": not _failed(checks), "checks": [asdict(c) for c in checks]}
        print(json.dumps(summary, indent=1))
    else:
        print("\n".join(_row(check) for check in checks))
    if _failed(checks):
        sys.exit(ExitCode.RUNTIME)


def _failed(checks: list[Check]) -> bool:
    return any(check.status == FAIL for check in checks)


def _row(check: Check) -> str:
    advice = f"\n                              {check.advice}" if check.advice else ""
    return f"{MARKS[check.status]}  {check.name:<22} {check.detail}{advice}"
