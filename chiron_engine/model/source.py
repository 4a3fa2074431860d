"""From what the user names to a model directory on this machine. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from chiron_engine.model.directory import check_directory
from chiron_engine.model.errors import ModelError

Progress = Callable[[str, float], None]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ACCEPTED = "a Hugging Face directory, an id, a .gguf file, or smollm2"
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja")


def resolve_model(name: str, progress: Progress | None = None) -> Path:
    """The directory of a model: `smollm2`, a GGUF file, a Hugging Face directory, or a Hugging Face id.

    progress(phase, fraction) is called while something is converted or downloaded. Raises
    ModelError where there is no such model, or where it cannot be served.
    """
    if name == "smollm2":
        from chiron_engine.model.smollm2 import smollm2_directory

        return smollm2_directory(progress)
    if is_gguf_file(name):
        from chiron_engine.model.converted_gguf import gguf_directory

        return gguf_directory(Path(name).expanduser(), progress)
    path = _local_directory(name) or _download(name, progress)
    check_directory(path)
    return path


def is_gguf_file(name: str) -> bool:
    """Whether `name` is a file on this machine whose name says that it is GGUF."""
    try:
        return name.lower().endswith(".gguf") and Path(name).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def _local_directory(name: str) -> Path | None:
    """The directory `name`, or None where it may be an id. Raises ModelError where it is neither."""
    try:
        path = Path(name).expanduser()
        if name and path.is_dir():
            return path
        is_file = path.is_file()
    except (OSError, RuntimeError):
        is_file = False
    if is_file:
        raise ModelError(f"{name} is a single file, and its name does not end in .gguf: give {_ACCEPTED}")
    if name.lower().endswith(".gguf"):
        raise ModelError(f"no file {name[:200]!r}: give {_ACCEPTED}")
    if len(name) > 200 or not _HUB_ID.fullmatch(name):
        raise ModelError(f"no directory {name[:200]!r}: give {_ACCEPTED}")
    return None


def _download(name: str, progress: Progress | None) -> Path:
    """A snapshot of a Hugging Face repository, weights as safetensors only."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ModelError(f"no directory {name!r}, and huggingface_hub is not installed to fetch it") from None
    if progress is not None:
        progress(f"download {name}", 0.0)
    try:
        path = Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except LocalEntryNotFoundError:
        raise ModelError(
            f"no directory {name!r}, and Hugging Face cannot be reached to look for an id of that name"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot download {name!r} from Hugging Face: {cause}") from None
    if progress is not None:
        progress(f"download {name}", 1.0)
    return path
