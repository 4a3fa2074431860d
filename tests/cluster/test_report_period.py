"""How often engines report."""

from __future__ import annotations

import pytest

from chiron_engine.cluster.engine_roster import SILENT_S, report_every_s


@pytest.mark.parametrize("engines, seconds", [(1, 0.25), (25, 0.25), (50, 0.5), (100, 1.0)])
def test_large_fleets_report_less_often(engines: int, seconds: float) -> None:
    assert report_every_s(engines) == seconds


def test_no_fleet_is_so_large_that_its_engines_look_dead() -> None:
    assert report_every_s(100_000) <= SILENT_S / 4
