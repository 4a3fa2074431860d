"""Every way a model directory can be broken ends in one line that names the cause."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chiron_engine.model.errors import ModelError
from chiron_engine.model.loader import load_model
from chiron_engine.model.precision import FLOAT32
from chiron_engine.model.source import resolve_model
from tests.model.tiny_config import TINY

WEIGHTS = "model.safetensors"


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write(file: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def change_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, body = header_of(path / WEIGHTS)
        change(header)
        write(path / WEIGHTS, header, body)

    return damage


def change_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(path / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return damage


def change_config(**fields: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | fields))

    return damage


def only_pickle(path: Path) -> None:
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


def index_without_file(path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def index_outside(path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda p: (p / "config.json").write_text("{"), "config.json"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "holds list"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), "no .safetensors"),
    "only a pickle": (only_pickle, "pytorch_model.bin"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "no tokenizer.json"),
    "only sentencepiece": (lambda p: (p / "tokenizer.json").rename(p / "tokenizer.model"), "tokenizer.model"),
    "index names a missing file": (index_without_file, "model-00002-of-00002"),
    "index leads outside": (index_outside, "outside"),
    "truncated": (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-100]), WEIGHTS),
    "cut in the header": (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:50]), WEIGHTS),
    "empty": (lambda p: (p / WEIGHTS).write_bytes(b""), WEIGHTS),
    "header lies about a shape": (change_header(lambda h: h[NORM].update(shape=[64])), WEIGHTS),
    "header lies about offsets": (
        change_header(lambda h: h[NORM].update(data_offsets=[0, 1 << 40])),
        WEIGHTS,
    ),
    "header is huge": (lambda p: (p / WEIGHTS).write_bytes(b"\xff" * 16), WEIGHTS),
    "missing tensor": (change_tensors(lambda t: t.pop(NORM)), NORM),
    "wrong shape": (change_tensors(lambda t: t.update({NORM: torch.ones(31)})), r"shape \[31\].*\[32\]"),
    "wrong dtype": (change_tensors(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})), "int8"),
    "config disagrees": (change_config(vocab_size=97), EMBED),
    "one layer too many": (change_config(num_hidden_layers=4), r"model\.layers\.3\."),
    "one layer too few": (change_config(num_hidden_layers=2), r"does not account for, model\.layers\.2\."),
    "eos outside": (change_config(eos_token_id=99999999), r"99999999, outside the vocabulary"),
    "eos is a word": (change_config(eos_token_id="end"), "eos_token_id"),
}


@pytest.fixture
def good(save_tiny: Any) -> Path:
    from transformers import LlamaConfig

    path = save_tiny(LlamaConfig(**TINY))[1]
    (path / "generation_config.json").unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, good: Path) -> None:
    damage, cause = DAMAGE[name]
    load_model(good, precision=FLOAT32, device=torch.device("cpu"))
    damage(good)
    with pytest.raises(ModelError, match=cause) as caught:
        load_model(resolve_model(str(good)), precision=FLOAT32, device=torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("/no/such/model", "no directory '/no/such/model'"),
        ("./nowhere", "no directory"),
        ("a/b/c", "no directory"),
        ("", "no directory"),
        ("bad\x00name", "no directory"),
        ("x" * 5000 + "/", "no directory"),
        ("model.gguf", "no file 'model.gguf'"),
    ],
)
def test_names_that_are_no_model(name: str, cause: str) -> None:
    with pytest.raises(ModelError, match=cause):
        resolve_model(name)


def test_an_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="nobody/nothing"):
        resolve_model("nobody/nothing")
