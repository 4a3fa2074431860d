"""`chiron bench`: replay traces against a running server, each request at its time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from .bench_options import REPLAY_OPTIONS, check_address, check_scaling
from .console import note
from .exits import CommandError, ExitCode
from .option_tables import with_options
from .run_outputs import STDOUT, check_outputs, input_errors, output_errors, write_text
from .simulation_options import SLO_OPTIONS, WORKLOAD_OPTIONS, check_traces_given

if TYPE_CHECKING:
    from .bench_run import BenchRun


@with_options("slo", SLO_OPTIONS, "Service level objectives")
@with_options("replay", REPLAY_OPTIONS, "Replay")
@with_options("workload", WORKLOAD_OPTIONS, "Workload")
def bench(
    workload: dict[str, Any],
    slo: dict[str, Any],
    replay: dict[str, Any],
    address: Annotated[str, Option(metavar="HOST:PORT", help="The server's gRPC address.")],
    json_file: Annotated[
        str | None, Option("--json", metavar="FILE", help="Where JSON goes; - is standard output.")
    ] = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Figure over time: .png, .svg or .pdf.")] = None,
) -> None:
    """Replay an interactive and a batch trace against a running server, over gRPC.

    Open loop: each request is sent at its time, whatever the server does; how late it was sent is in
    the report. Prompts are random tokens of the trace's lengths, outputs as long as the trace says.
    A table goes to standard output, or to standard error with --json -.
    """
    from . import bench_run

    options = {**workload, **slo, **replay}
    with input_errors():
        check_address(address)
        check_outputs(json_file, plot)
        check_traces_given(workload, slo)
        check_scaling(options)
        asked = bench_run.load(options)
    run = bench_run.run(address, asked, options)
    if run.summary is None:
        raise CommandError("stopped before any request was sent", ExitCode.INTERRUPT)
    _write(run, json_file, plot)
    if run.interrupted:
        sys.exit(ExitCode.INTERRUPT)
    if not run.summary["finished"]:
        raise CommandError(f"no request of {run.summary['requests']:,} succeeded")


def _write(run: BenchRun, json_file: str | None, plot: Path | None) -> None:
    from chiron_engine.bench.report import print_bench
    from chiron_engine.bench.summary import warnings

    assert run.summary is not None  # checked by the caller
    if json_file is not None:
        write_text(json_file, json.dumps(run.summary, indent=1, allow_nan=False))
    if plot is not None:
        _plot(run, plot)
    for warning in warnings(run.summary):
        note(f"chiron: {warning}")
    file = sys.stderr if json_file == STDOUT else sys.stdout
    with output_errors():
        print(*run.lines, sep="\n", file=file)
        print_bench(run.summary, file)
        file.flush()


def _plot(run: BenchRun, path: Path) -> None:
    from chiron_engine.bench.plot import plot_bench

    assert run.measured is not None  # as the summary
    try:
        plot_bench(run.measured, path, title="\n".join(run.lines))
    except OSError as error:
        raise CommandError(f"--plot: {path}: {error.strerror or error}") from error
