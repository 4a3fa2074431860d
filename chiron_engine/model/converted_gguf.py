"""GGUF files, each converted once into a Hugging Face directory in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from chiron_engine.model.cache import cache_dir
from chiron_engine.model.errors import ModelError

if TYPE_CHECKING:
    from chiron_engine.model.source import Progress

log = logging.getLogger(__name__)

# Part of the cache path: raise it with every change of what the conversion writes.
CONVERSION = 3
_MANIFEST = "manifest.json"


def gguf_directory(file: Path, progress: Progress | None = None) -> Path:
    """The converted model of a GGUF file, made now if need be, and anew where the file has changed
    since (its length or its time of change). Raises ModelError."""
    try:
        file = file.resolve()
        found = file.stat()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror or error}") from None
    digest = hashlib.sha256(os.fsencode(file)).hexdigest()[:16]
    root = cache_dir() / "models" / f"gguf-{CONVERSION}-{digest}"
    return converted(file, root / file.stem, f"{found.st_size}-{found.st_mtime_ns}", progress)


def converted(file: Path, target: Path, version: str, progress: Progress | None) -> Path:
    """`target`, filled from `file` unless it has been already from this `version` of the file. Several
    processes may call this at once. Raises ModelError."""
    if _is_current(target, version):
        return target
    root = target.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "lock"):
            _convert_into(file, target, version, progress)
    except OSError as error:
        raise ModelError(f"cannot write the converted model to {root}: {error}; set CHIRON_CACHE") from None
    return target


def broken_file(directory: Path) -> str | None:
    """The first file that is missing or not as long as it was when the directory was made."""
    try:
        for name, size in _manifest(directory)["files"].items():
            file = directory / name
            if not file.is_file() or file.stat().st_size != size:
                return str(name)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return _MANIFEST
    return None


def _manifest(directory: Path) -> Any:
    return json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))


def _is_current(target: Path, version: str) -> bool:
    if not target.is_dir() or broken_file(target) is not None:
        return False
    return bool(_manifest(target).get("version") == version)


def _convert_into(file: Path, target: Path, version: str, progress: Progress | None) -> None:
    """Fill `target`, all or nothing, unless another process has done so while this one waited."""
    if _is_current(target, version):
        return
    _remove_old(file, target)
    try:
        from chiron_engine.model.gguf_conversion import convert_gguf
    except ImportError as error:
        raise ModelError(f"converting {file.name} needs {error.name}: pip install gguf") from None
    temporary = Path(tempfile.mkdtemp(prefix="converting-", dir=target.parent))
    try:
        convert_gguf(file, temporary, progress)
        sizes = {made.name: made.stat().st_size for made in sorted(temporary.iterdir())}
        manifest = {"version": version, "files": sizes}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_old(file: Path, target: Path) -> None:
    if not target.is_dir():
        return
    broken = broken_file(target)
    if broken is None:
        log.info("%s has changed: converting the model again", file)
    else:
        log.warning("%s is broken: converting the model again", target / broken)
    shutil.rmtree(target)
