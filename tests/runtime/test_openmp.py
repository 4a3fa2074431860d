"""How long compute threads spin is set before torch reads it, and never over the user's own."""

from __future__ import annotations

import os

import pytest

from chiron_engine.runtime.openmp import SETTING, SPINS, bound_spinning


@pytest.mark.parametrize(("setting", "expected"), [(None, SPINS), ("7", "7")])
def test_a_setting_of_the_users_stands(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, expected: str
) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    if setting is not None:
        monkeypatch.setenv(SETTING, setting)
    bound_spinning()
    assert os.environ[SETTING] == expected
