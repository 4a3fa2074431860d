"""Profiles by name: those packaged here, and files of one's own."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from .profile import Profile
from .profile_file import read_profile

SUFFIX = ".json"


def profile_names() -> list[str]:
    """Names of the packaged profiles, sorted."""
    return sorted(_packaged())


def load_profile(name: str) -> Profile:
    """A packaged profile by name, or the one in a file by its path.

    Each call gives step times of their own, with their own count of extrapolations. Raises
    ValueError for an unknown name, listing those there are, or for a file without a usable profile.
    """
    packaged = _packaged()
    if name in packaged:
        return read_profile(packaged[name].read_text(encoding="utf-8"), name)
    path = Path(name)
    if path.is_file():
        try:
            return read_profile(path.read_text(encoding="utf-8"), name)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not a text file: {error}") from error
    listing = "\n  ".join(sorted(packaged))
    raise ValueError(f"there is no profile {name!r} and no such file; packaged are\n  {listing}")


def _packaged() -> dict[str, Traversable]:
    root = files("chiron_engine.sim").joinpath("data", "profiles")
    return dict(_profiles_under(root, ""))


def _profiles_under(folder: Traversable, prefix: str) -> list[tuple[str, Traversable]]:
    found = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _profiles_under(entry, f"{prefix}{entry.name}/")
        elif prefix and entry.name.endswith(SUFFIX):
            found.append((prefix + entry.name.removesuffix(SUFFIX), entry))
    return found
