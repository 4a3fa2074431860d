"""The user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$CHIRON_CACHE, else $XDG_CACHE_HOME/chiron, else ~/.cache/chiron. It need not exist yet."""
    own = os.environ.get("CHIRON_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "chiron"
