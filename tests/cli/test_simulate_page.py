"""docs/simulate.md names files, options and policies that exist."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from chiron_engine.cli import make_app
from chiron_engine.commands.simulation import POLICY_NAMES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "simulate.md").read_text(encoding="utf-8")


def test_the_files_it_maps_exist() -> None:
    named = set(re.findall(r"`([\w/]+\.(?:py|md))`", PAGE))
    folders = ("", "chiron_engine", "chiron_engine/policy", "chiron_engine/sim")
    missing = [name for name in named if not any((ROOT / folder / name).exists() for folder in folders)]
    assert not missing
    assert len(named) > 30


def test_the_options_it_names_exist() -> None:
    command = typer.main.get_command(make_app())
    options = command.commands["simulate"].params  # type: ignore[attr-defined]
    flags = {flag for option in options for flag in option.opts}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE)) - {"--scale"}
    assert named <= flags


def test_the_policies_it_names_are_those_on_offer() -> None:
    assert all(f"`{name.split('[')[0]}`" in PAGE for name in POLICY_NAMES)
