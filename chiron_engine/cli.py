"""The `chiron` command. Each command is a file in commands/, loaded when it is called."""

from __future__ import annotations

import sys

import typer

from chiron_engine import __version__
from chiron_engine.commands import (
    batch,
    bench,
    calibrate,
    coordinator,
    doctor,
    drain,
    engine,
    gateway,
    generate,
    ps,
    replay,
    scale,
    serve,
    simulate,
    top,
)
from chiron_engine.commands.exits import CommandError

app = typer.Typer(
    name="chiron",
    help="Serve large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("coordinator")(coordinator.coordinator)
app.command("engine")(engine.engine)
app.command("gateway")(gateway.gateway)
app.command("generate")(generate.generate)
app.add_typer(batch.app, name="batch")
app.command("ps")(ps.ps)
app.command("top")(top.top)
app.command("drain")(drain.drain)
app.command("retire")(drain.retire)
app.command("scale")(scale.scale)
app.command("simulate")(simulate.simulate)
app.command("bench")(bench.bench)
app.command("calibrate")(calibrate.calibrate)
app.command("replay")(replay.replay)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"chiron {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Serve large language models."""


def main() -> None:
    """Run the command line and exit with one of `exits.ExitCode`."""
    try:
        app(prog_name="chiron")
    except CommandError as error:
        print(f"chiron: {error.message}", file=sys.stderr)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
