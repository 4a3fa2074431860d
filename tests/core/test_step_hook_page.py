"""The example of docs/step-hooks.md runs as printed, and its table names the fields that exist."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from chiron_engine.core.step_stats import StepStats
from tests.core.engines import null_core

PAGE = (Path(__file__).parents[2] / "docs" / "step-hooks.md").read_text()


def test_the_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code is not None
    exec(compile(code[1], "docs/step-hooks.md", "exec"), {"core": null_core()})


def test_the_table_lists_every_field() -> None:
    listed = {
        name for row in re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE) for name in row.split("`")[1::2]
    }
    assert listed == {field.name for field in fields(StepStats)}
