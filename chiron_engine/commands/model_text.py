"""Where a model's text side is found, and where it has none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chiron_engine.config import EngineConfig

if TYPE_CHECKING:
    from chiron_engine.gateway.text import ModelText
    from chiron_engine.model.source import Progress


def text_directory(config: EngineConfig, progress: Progress | None = None) -> Path | None:
    """The directory of the model's tokenizer. A simulated engine's model may be any name: None where it
    is no directory with a tokenizer. Raises ModelError."""
    from chiron_engine.model.source import is_gguf_file, resolve_model

    if config.executor == "torch" or config.model == "smollm2" or is_gguf_file(config.model):
        return resolve_model(config.model, progress)
    directory = Path(config.model).expanduser()
    return directory if (directory / "tokenizer.json").is_file() else None


def engine_model_name(config: EngineConfig, directory: Path | None) -> str:
    """What an engine of this configuration calls its model. directory: the one of the model."""
    from chiron_engine.model.directory import model_name

    if config.served_model_name is not None:
        return config.served_model_name
    if config.executor == "simulated" or directory is None:
        return Path(config.model).name
    return model_name(directory)


def model_text(directory: Path | str | None) -> ModelText:
    """Raises ModelFilesError."""
    if directory is None:
        from chiron_engine.gateway.no_tokenizer import NoTokenizer

        return NoTokenizer()
    from chiron_engine.gateway.text import ModelText

    return ModelText.from_directory(directory)
