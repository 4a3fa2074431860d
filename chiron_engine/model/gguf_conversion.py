"""A GGUF file of the Llama family as a Hugging Face directory.

The weights are unpacked to float32, which holds every value of the block formats exactly or nearly
so; what is computed from them no longer depends on how they were packed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from chiron_engine.model.directory import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
)
from chiron_engine.model.errors import ModelError
from chiron_engine.model.gguf_config import LLAMA3_FACTORS, gguf_config
from chiron_engine.model.gguf_file import GgufFile
from chiron_engine.model.gguf_tokenizer import GgufTokenizer

# Bytes of float32 weights in one file, and so about what a conversion holds in memory.
_FILE_BYTES = 4 << 30

Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor belongs: its Hugging Face name and its shape. heads: the number of heads its rows
    are of, where the file interleaves them; else 0."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0

    @property
    def size(self) -> int:
        """In bytes."""
        return 4 * int(np.prod(self.shape))


def convert_gguf(source: Path, target: Path, progress: Report | None = None) -> None:
    """Write config.json, generation_config.json, the weights as safetensors, tokenizer.json and
    tokenizer_config.json into the directory `target`. Raises ModelError for a damaged file, and for
    an architecture, a tokenizer or a packing that is not supported."""
    report = progress or (lambda phase, fraction: None)
    report("read GGUF", 0.0)
    file = GgufFile(source)
    config = gguf_config(file)
    tokenizer = GgufTokenizer(file, config["vocab_size"])
    places = _places(file, config)
    file.check_packing()
    _check_space(target, sum(place.size for place in places.values()))
    report("write tokenizer", 0.05)
    tokenizer.build().save(str(target / TOKENIZER))
    _write_json(target / TOKENIZER_CONFIG, tokenizer.config(config["max_position_embeddings"]))
    _write_json(target / CONFIG, config | tokenizer.token_ids())
    _write_json(target / GENERATION_CONFIG, tokenizer.token_ids())
    report("convert weights", 0.1)
    _write_weights(file, places, target, report)
    report("converted", 1.0)


def _places(file: GgufFile, config: dict[str, Any]) -> dict[str, _Place]:
    """Every tensor of the model by its name in the file. Raises ModelError where the file lacks one,
    has another besides, or has one of another shape."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    places = {
        "token_embd.weight": _Place("model.embed_tokens.weight", (vocabulary, hidden)),
        "output_norm.weight": _Place("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        places["output.weight"] = _Place("lm_head.weight", (vocabulary, hidden))
    for layer in range(config["num_hidden_layers"]):
        for name, place in _layer_places(config).items():
            places[f"blk.{layer}.{name}"] = _Place(
                f"model.layers.{layer}.{place.name}", place.shape, place.heads
            )
    for name, place in places.items():
        if file.shape(name) != place.shape:
            raise file.fail(f"{name} has shape {list(file.shape(name))}, not {list(place.shape)}")
    more = [name for name in file.tensors if name not in places and not _is_derived(name)]
    if more:
        raise file.fail(f"has {len(more)} tensors that are not supported, {more[0]} among them")
    return places


def _layer_places(config: dict[str, Any]) -> dict[str, _Place]:
    """The tensors of one layer, by their names within it."""
    hidden, middle, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    qwen2, qwen3 = (config["model_type"] == kind for kind in ("qwen2", "qwen3"))
    bias, mlp_bias = config["attention_bias"], config["mlp_bias"]
    # The Llama files interleave the rows of queries and keys; Qwen's are as Hugging Face has them.
    turned = not (qwen2 or qwen3)
    places = {
        "attn_norm.weight": _Place("input_layernorm.weight", (hidden,)),
        "ffn_norm.weight": _Place("post_attention_layernorm.weight", (hidden,)),
    }
    if qwen3:
        places["attn_q_norm.weight"] = _Place("self_attn.q_norm.weight", (dim,))
        places["attn_k_norm.weight"] = _Place("self_attn.k_norm.weight", (dim,))

    def add(name: str, ours: str, shape: tuple[int, int], biased: bool, turned_heads: int = 0) -> None:
        places[f"{name}.weight"] = _Place(f"{ours}.weight", shape, turned_heads)
        if biased:
            places[f"{name}.bias"] = _Place(f"{ours}.bias", shape[:1], turned_heads)

    add("attn_q", "self_attn.q_proj", (heads * dim, hidden), bias or qwen2, heads if turned else 0)
    add("attn_k", "self_attn.k_proj", (kv_heads * dim, hidden), bias or qwen2, kv_heads if turned else 0)
    add("attn_v", "self_attn.v_proj", (kv_heads * dim, hidden), bias or qwen2)
    add("attn_output", "self_attn.o_proj", (hidden, heads * dim), bias)
    add("ffn_gate", "mlp.gate_proj", (middle, hidden), mlp_bias)
    add("ffn_up", "mlp.up_proj", (middle, hidden), mlp_bias)
    add("ffn_down", "mlp.down_proj", (hidden, middle), mlp_bias)
    return places


def _is_derived(name: str) -> bool:
    """A tensor that config.json says in numbers, or that old files carry and nothing reads."""
    return name == LLAMA3_FACTORS or name.endswith(".attn_rot_embd.weight")


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if free < needed:
        raise ModelError(
            f"{target.parent} has {free / 1e9:.1f} GB free, but the unpacked weights take "
            f"{needed / 1e9:.1f} GB; set CHIRON_CACHE to a folder with more"
        )


def _write_weights(file: GgufFile, places: dict[str, _Place], target: Path, report: Report) -> None:
    groups = list(_groups(places))
    names = [WEIGHTS] if len(groups) == 1 else _part_names(len(groups))
    done = 0
    for name, group in zip(names, groups, strict=True):
        tensors = {}
        for key in group:
            tensors[places[key].name] = _weights(file, key, places[key])
            done += 1
            report("convert weights", 0.1 + 0.8 * done / len(places))
        try:
            save_file(tensors, target / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from None
    if len(groups) > 1:
        _write_json(target / WEIGHTS_INDEX, _index(names, groups, places))


def _groups(places: dict[str, _Place]) -> Iterator[list[str]]:
    """The tensors that go into one file, in order."""
    group: list[str] = []
    size = 0
    for key, place in places.items():
        if group and size + place.size > _FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(key)
        size += place.size
    yield group


def _part_names(count: int) -> list[str]:
    return [f"model-{part + 1:05d}-of-{count:05d}.safetensors" for part in range(count)]


def _index(names: list[str], groups: list[list[str]], places: dict[str, _Place]) -> dict[str, Any]:
    pairs = zip(names, groups, strict=True)
    return {
        "metadata": {"total_size": sum(place.size for place in places.values())},
        "weight_map": {places[key].name: name for name, group in pairs for key in group},
    }


def _weights(file: GgufFile, key: str, place: _Place) -> np.ndarray:
    values = file.weights(key)
    if place.heads:
        values = _half_rotation(values, place.heads)
    return np.ascontiguousarray(values)


def _half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """The file interleaves the two halves of each head, so that rotary pairs are neighbours; Hugging
    Face pairs element i with i + D / 2. weight: [heads * D, hidden], or a bias [heads * D]."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
