"""What torch reads while it is loaded is set before, and never over the user's own."""

from __future__ import annotations

import os

import pytest

from chiron_engine.runtime.torch_environment import SETTINGS, prepare_environment


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("setting", [None, "7"])
def test_a_setting_of_the_users_stands(
    monkeypatch: pytest.MonkeyPatch, name: str, setting: str | None
) -> None:
    monkeypatch.delenv(name, raising=False)
    if setting is not None:
        monkeypatch.setenv(name, setting)
    prepare_environment()
    assert os.environ[name] == (setting or SETTINGS[name])
