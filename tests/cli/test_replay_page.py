"""docs/replay.md names options, keys and digests that exist, and shows lines that are written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import typer

from chiron_engine.cli import make_app
from chiron_engine.cluster.event_log import EventLog
from chiron_engine.commands.replay import _replay_file
from chiron_engine.policy.fleet.messages import RequestFinished, Route
from tests.cluster.test_event_log import begun

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "replay.md").read_text(encoding="utf-8")


def flags_of(*commands: str) -> set[str]:
    group = typer.main.get_command(make_app())
    options = [option for name in commands for option in group.commands[name].params]  # type: ignore[attr-defined]
    return {flag for option in options for flag in option.opts}


def test_the_options_and_files_it_names_exist() -> None:
    flags = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", PAGE))
    assert {"--event-log", "--record-steps", "--json"} <= flags <= flags_of("serve", "engine", "replay")
    assert {"--record-steps"} <= flags_of("engine")
    for script in re.findall(r"scripts/\w+\.py", PAGE):
        assert (ROOT / script).exists()


def test_the_line_it_shows_is_what_is_written(tmp_path: Path) -> None:
    (shown,) = [line for line in PAGE.splitlines() if line.startswith('{"event":')]
    with begun(tmp_path / "log") as log:
        log._number = 6
        log.event(RequestFinished(4, 60), 26739.36)
        log.effects([Route(5, 0, 0)])
    assert (tmp_path / "log").read_text().splitlines()[1] == shown


def test_the_keys_it_names_are_those_of_a_result(tmp_path: Path) -> None:
    with EventLog(tmp_path / "log"):
        pass
    with begun(tmp_path / "log"):
        pass
    result = json.loads(json.dumps(_replay_file(tmp_path / "log")))
    (named,) = re.findall(r"each with (.*?)\. Exit codes", PAGE, re.DOTALL)
    assert re.findall(r"`(\w+)`", named) == list(result)
