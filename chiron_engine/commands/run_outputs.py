"""What commands that run a workload share: input checked before the run, figures written after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .exits import CommandError, usage_error

STDOUT = "-"


@contextmanager
def input_errors() -> Iterator[None]:
    """A ValueError in here is about what the user asked for; it is told on one line."""
    try:
        yield
    except ValueError as error:
        first, *others = str(error).splitlines()
        listed = "; ".join(line.strip(" -") for line in others)
        raise usage_error(f"{first} {listed}".strip()) from error


def check_outputs(json_file: str | None, plot: Path | None) -> None:
    """Raises ValueError for a file that cannot be written, before a run is paid for."""
    if json_file not in (None, STDOUT):
        path = Path(json_file)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"--json: {json_file!r} is no file in a folder that exists")
    if plot is not None:
        from chiron_engine.sim.plot import check_plot_path

        check_plot_path(plot)


def write_text(json_file: str, text: str) -> None:
    if json_file == STDOUT:
        with output_errors():
            print(text, flush=True)
        return
    try:
        Path(json_file).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--json: {json_file}: {error.strerror or error}") from error


@contextmanager
def output_errors() -> Iterator[None]:
    """A reader that has left ends the command quietly, as everywhere; a full disk is told."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(f"the output cannot be written: {error.strerror or error}") from error
