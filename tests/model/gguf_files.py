"""Tiny GGUF files, written from models of the Hugging Face classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.model.tiny_config import TINY

SIZE = TINY["vocab_size"]
TOKENS = ["<|end|>", "<s>", "</s>", "<think>", *map(chr, range(33, 123)), "Ġ", "ab"]
assert len(TOKENS) == SIZE
Quantise = gguf.GGMLQuantizationType


@dataclass
class Recipe:
    """What to write. skip: tensors left out; more: tensors besides; quantise: the type of the layers'
    matrices; more_keys: writes metadata besides; pre: how text is split; tokenizer: writes all of the
    tokenizer's metadata, in place of a byte-level one's."""

    arch: str
    skip: tuple[str, ...] = ()
    more: dict[str, np.ndarray] = field(default_factory=dict)
    quantise: Quantise | None = None
    more_keys: Callable[[gguf.GGUFWriter], None] = lambda writer: None
    pre: str | None = "qwen2"
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None


def write_gguf(file: Path, model: Any, recipe: Recipe) -> None:
    """A Hugging Face model as a GGUF file; the names are those that gguf's own table has."""
    config = model.config
    writer = gguf.GGUFWriter(file, recipe.arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    recipe.more_keys(writer)
    (recipe.tokenizer or byte_level(recipe.pre))(writer)
    for name, value in gguf_tensors(model, recipe.arch).items():
        if name not in recipe.skip:
            _add(writer, name, value, recipe)
    for name, value in recipe.more.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level(pre: str | None) -> Callable[[gguf.GGUFWriter], None]:
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3, 3, 4, *[1] * (SIZE - 4)])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ messages[0]['content'] }}")

    return write


def gguf_tensors(model: Any, arch: str) -> dict[str, np.ndarray]:
    """The model's tensors by their names in the file, queries and keys interleaved for llama."""
    kind = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    table = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    found = {}
    for name, parameter in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        value = parameter.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = model.config.num_attention_heads
            value = interleaved(value, heads if "q_proj" in name else model.config.num_key_value_heads)
        found[table.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    return found


def interleaved(value: np.ndarray, heads: int) -> np.ndarray:
    """Each head's rows, halves (0..3, 4..7) interleaved to 0 4 1 5 2 6 3 7."""
    dim = len(value) // heads
    order = [head * dim + i // 2 + (i % 2) * dim // 2 for head in range(heads) for i in range(dim)]
    return np.ascontiguousarray(value[order])


def _add(writer: gguf.GGUFWriter, name: str, value: np.ndarray, recipe: Recipe) -> None:
    if recipe.quantise is None or value.ndim == 1 or not name.startswith("blk."):
        writer.add_tensor(name, value)
        return
    writer.add_tensor(name, gguf.quantize(value, recipe.quantise), raw_dtype=recipe.quantise)
