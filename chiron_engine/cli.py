"""The `chiron` command. Each command is a file in commands/, loaded when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable

import typer

from chiron_engine import __version__
from chiron_engine.commands.exits import CommandError

COMMANDS = {
    "serve": "serve",
    "coordinator": "coordinator",
    "engine": "engine",
    "gateway": "gateway",
    "generate": "generate",
    "batch": "batch",
    "ps": "ps",
    "top": "top",
    "drain": "drain",
    "retire": "drain",
    "scale": "scale",
    "simulate": "simulate",
    "bench": "bench",
    "calibrate": "calibrate",
    "replay": "replay",
    "doctor": "doctor",
}
"""The file in commands/ that each command is in."""


def make_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The command line with these commands, whose files are loaded now."""
    app = typer.Typer(
        name="chiron",
        help="Serve large language models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_common)
    for name in names:
        file = importlib.import_module(f"chiron_engine.commands.{COMMANDS[name]}")
        if hasattr(file, "app"):  # a command with commands of its own
            app.add_typer(file.app, name=name)
        else:
            app.command(name)(getattr(file, name))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"chiron {__version__}")
        raise typer.Exit


def _common(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Serve large language models."""


def main() -> None:
    """Run the command line and exit with one of `exits.ExitCode`."""
    named = [word for word in sys.argv[1:2] if word in COMMANDS]
    try:
        # All of them where none is named: for help, and to name the one that was meant.
        make_app(named or COMMANDS)(prog_name="chiron")
    except CommandError as error:
        print(f"chiron: {error.message}", file=sys.stderr)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
