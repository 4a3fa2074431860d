"""A model directory as Hugging Face lays it out: what must be in it, and its JSON files.

Nothing here loads torch or runs code that comes with a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chiron_engine.model.errors import ModelError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model. Raises ModelError where it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}: give a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}; download the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}, not an object; download the model again")
    return value


def check_directory(path: Path) -> None:
    """Raise ModelError unless `path` has a configuration, safetensors weights and a tokenizer."""
    if not path.is_dir():
        raise ModelError(f"{path} is not a directory: give a Hugging Face model directory")
    read_json(path / CONFIG)
    weight_files(path)
    _check_tokenizer(path)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model, all present. Raises ModelError where there are none."""
    if (path / WEIGHTS_INDEX).is_file():
        files = sorted({path / name for name in _indexed_files(path / WEIGHTS_INDEX)})
    else:
        files = [path / WEIGHTS] if (path / WEIGHTS).is_file() else sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{path} lacks {', '.join(missing)}, named in its index; download the model again")
    if files:
        return files
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        raise ModelError(
            f"{path} has its weights only as {pickled[0]}, a pickle, which can run code and is never "
            "loaded; convert it to safetensors"
        )
    raise ModelError(f"{path} has no .safetensors file; download the model again")


def _indexed_files(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index} has no weight_map; download the model again")
    outside = [name for name in names.values() if Path(name).name != name]
    if outside:
        raise ModelError(f"{index} names {outside[0]!r}, outside the model's directory")
    return list(names.values())


def _check_tokenizer(path: Path) -> None:
    if (path / TOKENIZER).is_file():
        return
    other = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (path / name).is_file()]
    if other:
        raise ModelError(
            f"{path} has {other[0]} but no {TOKENIZER}; make one with transformers: "
            f"AutoTokenizer.from_pretrained(dir).save_pretrained(dir)"
        )
    raise ModelError(f"{path} has no {TOKENIZER}; download the model's tokenizer too")


def eos_token_ids(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end a generation: generation_config.json's, else config.json's."""
    value = None
    if (path / GENERATION_CONFIG).is_file():
        value = read_json(path / GENERATION_CONFIG).get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise ModelError(f"{path} has eos_token_id {value!r}, which is not a token id nor a list of them")
    vocab = config.get("vocab_size")
    if isinstance(vocab, int) and not all(0 <= token < vocab for token in ids):
        raise ModelError(f"{path} has eos_token_id {value!r}, outside the vocabulary [0, {vocab})")
    return tuple(ids)


def model_name(path: Path) -> str:
    """The name of the model in `path`; for a snapshot in Hugging Face's cache, its owner/name."""
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name
