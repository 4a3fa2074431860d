"""GGUF files by their path: the same logits as the Hugging Face class, one conversion for each state of
the file, and a clear refusal of everything else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import SIZE, TOKENS, Quantise, Recipe, write_gguf
from packed import eager_logits, paged_logits, random_prompts, relative_error
from tokenizers import Tokenizer
from transformers import modeling_rope_utils

from chiron_engine.gateway.text import ModelText
from chiron_engine.model.directory import weight_files
from chiron_engine.model.errors import ModelError
from chiron_engine.model.loader import load_model
from chiron_engine.model.native import LlamaModel
from chiron_engine.model.precision import FLOAT32
from chiron_engine.model.source import resolve_model
from tests.model.tiny_config import TINY

CPU = torch.device("cpu")
CLASSES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
THETA = {"rope_theta": 10000.0}
LLAMA3 = THETA | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = THETA | {"rope_type": "linear", "factor": 2.0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHIRON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny_model(arch: str, **options: Any) -> Any:
    """A Hugging Face model with everything trainable random, biases and norms too."""
    import transformers

    config = getattr(transformers, CLASSES[arch])(**(TINY | {"intermediate_size": 64} | options))
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def served(file: Path) -> LlamaModel:
    model = load_model(resolve_model(str(file)), precision=FLOAT32, device=CPU)
    assert isinstance(model, LlamaModel)
    return model


def assert_same_logits(file: Path, reference: Any) -> None:
    prompts = random_prompts(SIZE)
    error = relative_error(paged_logits(served(file), prompts), eager_logits(reference, prompts))
    assert error < 1e-5


def linear_keys(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(LINEAR["factor"])


def yarn_keys(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(YARN["factor"])
    writer.add_rope_scaling_orig_ctx_len(YARN["original_max_position_embeddings"])


def window_keys(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(7)


SAME: dict[str, tuple[str, dict[str, Any], Callable[[gguf.GGUFWriter], None]]] = {
    "llama": ("llama", {}, lambda writer: None),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, lambda writer: None),
    "llama, wide heads": ("llama", {"head_dim": 16}, lambda writer: None),
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True}, lambda writer: None),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}, linear_keys),
    "qwen2": ("qwen2", {}, lambda writer: None),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, lambda writer: None),
    "qwen3": ("qwen3", {"head_dim": 16}, lambda writer: None),
    "qwen3, yarn": ("qwen3", {"head_dim": 16, "rope_parameters": YARN}, yarn_keys),
}


@pytest.mark.parametrize("case", SAME)
def test_equals_the_hugging_face_class(case: str, tmp_path: Path) -> None:
    arch, options, keys = SAME[case]
    model = tiny_model(arch, **options)
    write_gguf(tmp_path / "tiny.gguf", model, Recipe(arch, more_keys=keys))
    assert_same_logits(tmp_path / "tiny.gguf", model)


def test_llama3_scaling_is_found_in_its_factors(tmp_path: Path) -> None:
    model = tiny_model("llama", head_dim=64, rope_parameters=LLAMA3)
    scaled, _ = modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](model.config, CPU)
    plain = 10000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    factors = (plain / scaled.double()).float().numpy()
    write_gguf(tmp_path / "tiny.gguf", model, Recipe("llama", more={"rope_freqs.weight": factors}))
    assert_same_logits(tmp_path / "tiny.gguf", model)
    config = json.loads((resolve_model(str(tmp_path / "tiny.gguf")) / "config.json").read_text())
    assert config["rope_parameters"] == LLAMA3


def test_a_window_makes_it_mistral(tmp_path: Path) -> None:
    import transformers

    llama = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", llama, Recipe("llama", more_keys=window_keys))
    config = transformers.MistralConfig(**(TINY | {"intermediate_size": 64, "sliding_window": 7}))
    mistral = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    mistral.load_state_dict(llama.state_dict())
    assert_same_logits(tmp_path / "tiny.gguf", mistral.eval())


@pytest.mark.parametrize("kind", [Quantise.Q8_0, Quantise.Q4_0, Quantise.BF16])
def test_packed_weights_are_unpacked(kind: Quantise, tmp_path: Path) -> None:
    model = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", model, Recipe("llama", quantise=kind))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "layers" in name:
            packed = gguf.quantize(parameter.numpy(), kind)
            parameter.copy_(torch.from_numpy(gguf.dequantize(packed, kind)))
    assert_same_logits(tmp_path / "tiny.gguf", model)


def test_large_models_come_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chiron_engine.model import gguf_conversion

    monkeypatch.setattr(gguf_conversion, "_FILE_BYTES", 50_000)
    model = tiny_model("qwen3")
    write_gguf(tmp_path / "tiny.gguf", model, Recipe("qwen3"))
    assert len(weight_files(resolve_model(str(tmp_path / "tiny.gguf")))) > 2
    assert_same_logits(tmp_path / "tiny.gguf", model)


def test_converted_once_and_anew_when_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "My Model.gguf"
    write_gguf(file, tiny_model("qwen2"), Recipe("qwen2"))
    path = resolve_model(str(file))
    assert path.name == "My Model" and path.parent.name.startswith("gguf-")
    monkeypatch.chdir(tmp_path)
    assert resolve_model(file.name, lambda *_: pytest.fail("converted again")) == path
    before = (path / "model.safetensors").read_bytes()
    write_gguf(file, tiny_model("qwen2", rms_norm_eps=1e-3), Recipe("qwen2", quantise=Quantise.BF16))
    assert resolve_model(str(file)) == path
    assert (path / "model.safetensors").read_bytes() != before
    assert json.loads((path / "config.json").read_text())["rms_norm_eps"] == 1e-3
    (path / "tokenizer.json").unlink()
    assert (resolve_model(str(file)) / "tokenizer.json").is_file()


def test_a_file_that_differs_in_its_time_alone_is_converted_anew(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_model("llama"), Recipe("llama"))
    resolve_model(str(file))
    os.utime(file, ns=(1, 1))
    phases: list[str] = []
    resolve_model(str(file), lambda phase, _: phases.append(phase))
    assert phases[-1] == "converted"


def test_no_room_for_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chiron_engine.model import gguf_conversion

    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), Recipe("llama"))
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(gguf_conversion.shutil, "disk_usage", lambda _: full)
    with pytest.raises(ModelError, match="set CHIRON_CACHE to a folder with more"):
        resolve_model(str(tmp_path / "tiny.gguf"))


def key(name: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    kinds: dict[type, str] = {str: "add_string", int: "add_uint32", float: "add_float32", list: "add_array"}

    def write(writer: gguf.GGUFWriter) -> None:
        getattr(writer, kinds[type(value)])(name, value)

    return write


REFUSED: dict[str, tuple[Recipe, str]] = {
    "missing tensor": (
        Recipe("llama", skip=("blk.1.ffn_up.weight",)),
        r"tiny\.gguf: lacks the tensor blk\.1\.ffn_up\.weight",
    ),
    "missing table": (Recipe("llama", skip=("token_embd.weight",)), r"lacks the tensor token_embd\.weight"),
    "more tensors": (
        Recipe("llama", more={"blk.0.ffn_gate_inp.weight": np.ones((4, 32), np.float32)}),
        r"blk\.0\.ffn_gate_inp\.weight among them",
    ),
    "wrong shape": (
        Recipe("llama", skip=("output_norm.weight",), more={"output_norm.weight": np.ones(31, np.float32)}),
        r"output_norm\.weight has shape \[31\], not \[32\]",
    ),
    "packing": (
        Recipe("llama", skip=("output_norm.weight",), more={"output_norm.weight": np.ones(32, np.float64)}),
        r"output_norm\.weight is packed as F64, which is not supported",
    ),
    "experts": (Recipe("llama", more_keys=key("llama.expert_count", 8)), r"llama\.expert_count is 8"),
    "longrope": (
        Recipe("llama", more_keys=key("llama.rope.scaling.type", "longrope")),
        "'longrope' is not supported, only none, linear and yarn",
    ),
    "yarn's own factor": (
        Recipe("qwen2", more_keys=key("qwen2.rope.scaling.attn_factor", 0.5)),
        r"qwen2\.rope\.scaling\.attn_factor is 0\.5, which is not supported",
    ),
    "partial rotation": (
        Recipe("llama", more_keys=key("llama.rope.dimension_count", 4)),
        r"rope\.dimension_count is 4, but heads of 8 need 8",
    ),
    "odd rope factors": (
        Recipe("llama", more={"rope_freqs.weight": np.array([1, 2, 1, 3], np.float32)}),
        r"rope_freqs\.weight .*not supported",
    ),
    "unknown split": (
        Recipe("llama", pre="viking"),
        r"tokenizer\.ggml\.pre 'viking' is not supported, only default, gpt-2",
    ),
    "no split": (Recipe("llama", pre=None), r"tokenizer\.ggml\.pre '' is not supported"),
    "unknown tokenizer": (
        Recipe("llama", tokenizer=lambda writer: (writer.add_tokenizer_model("bert"), tokens(writer))[0]),
        r"tokenizer\.ggml\.model 'bert' is not supported, only gpt2 and llama",
    ),
    "part of several": (Recipe("llama", more_keys=key("split.count", 3)), "--merge"),
}


def tokens(writer: gguf.GGUFWriter) -> None:
    writer.add_token_list(TOKENS)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path, cache: Path) -> None:
    recipe, cause = REFUSED[case]
    write_gguf(tmp_path / "tiny.gguf", tiny_model(recipe.arch), recipe)
    assert_refused(tmp_path / "tiny.gguf", cause, cache)


def assert_refused(file: Path, cause: str, cache: Path) -> None:
    with pytest.raises(ModelError, match=cause) as caught:
        resolve_model(str(file))
    assert "\n" not in str(caught.value)
    assert not [made for made in cache.rglob("*") if made.is_file() and made.name != "lock"]


def test_other_architectures_are_refused(tmp_path: Path, cache: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    cause = "the architecture 'gemma3' is not supported, only llama, qwen2, qwen3"
    assert_refused(tmp_path / "tiny.gguf", cause, cache)


@pytest.mark.parametrize("left", [0, 3, 30, 500, 3000, -1])
def test_a_cut_file_is_named(left: int, tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_model("llama"), Recipe("llama"))
    whole = file.read_bytes()
    file.write_bytes(whole[:left] if left >= 0 else whole[:-64])
    assert_refused(file, r"tiny\.gguf(:| is not a GGUF file)", cache)


def test_other_files_are_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "page.gguf").write_text("<html>not found</html>")
    assert_refused(tmp_path / "page.gguf", r"is not a GGUF file: it begins with b'<htm'", cache)
    (tmp_path / "model-00001-of-00003.gguf").write_bytes(b"GGUF")
    assert_refused(tmp_path / "model-00001-of-00003.gguf", "one part of a split model", cache)
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    assert_refused(tmp_path / "model.bin", r"does not end in \.gguf", cache)


@pytest.fixture
def text_of(tmp_path: Path) -> Callable[[Recipe], ModelText]:
    def read(recipe: Recipe) -> ModelText:
        write_gguf(tmp_path / "tiny.gguf", tiny_model(recipe.arch), recipe)
        return ModelText.from_directory(resolve_model(str(tmp_path / "tiny.gguf")))

    return read


TextOf = Callable[[Recipe], ModelText]


def test_byte_level_text(text_of: TextOf) -> None:
    text = text_of(Recipe("qwen2"))
    ids = text.encode("cab <think>12<|end|>")
    assert [TOKENS[i] for i in ids] == ["c", "ab", "Ġ", "<think>", "1", "2", "<|end|>"]
    assert text.decode(ids) == "cab <think>12"
    assert text.decode(ids, skip_special_tokens=False) == "cab <think>12<|end|>"
    assert text.render_chat([{"role": "user", "content": "hello"}]) == "hello"


def test_the_split_says_whether_a_text_begins_with_bos(text_of: TextOf) -> None:
    assert text_of(Recipe("llama", pre="llama-bpe")).encode("a") == [1, TOKENS.index("a")]
    assert text_of(Recipe("llama", pre="smollm")).encode("a") == [TOKENS.index("a")]
    said = key("tokenizer.ggml.add_eos_token", 1)

    def both(writer: gguf.GGUFWriter) -> None:
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(True)

    assert text_of(Recipe("llama", pre="smollm", more_keys=both)).encode("a") == [1, TOKENS.index("a"), 2]
    with pytest.raises(ModelError, match="add_eos_token must be true or false, not 1"):
        text_of(Recipe("llama", more_keys=said))


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", ["it", "'", "s", " x", "12", " ", " ", "345", "67", "!", "\n ", " y"]),
        ("gpt-2", ["it", "'s", " x", "12", " ", " 34567", "!", "\n ", " y"]),
        ("smollm", ["it", "'s", " x", "1", "2", "  ", "3", "4", "5", "6", "7", "!", "\n ", " y"]),
        ("llama-bpe", ["it", "'s", " x", "12", " ", " ", "345", "67", "!\n", " ", " y"]),
        ("qwen2", ["it", "'s", " x", "1", "2", " ", " ", "3", "4", "5", "6", "7", "!\n", " ", " y"]),
    ],
)
def test_text_is_split_as_in_training(pre: str, pieces: list[str], tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), Recipe("llama", pre=pre))
    path = resolve_model(str(tmp_path / "tiny.gguf"))
    split = Tokenizer.from_file(str(path / "tokenizer.json")).pre_tokenizer
    text = "it's x12  34567!\n  y"
    spans = [span for _, span in split.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == pieces


SPM = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcd", "ab", "cd", "bc"]
SPM += ["abcd", "\u2581a", "<tool>"]


def sentencepiece(scores: list[float]) -> Callable[[gguf.GGUFWriter], None]:
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(SPM)
        writer.add_token_scores(scores)
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(SPM) - 260), 4])

    return write


def sentencepiece_model() -> Any:
    return tiny_model("llama", vocab_size=len(SPM) + 3)


def test_sentencepiece_text(tmp_path: Path) -> None:
    scores = [0.0] * 259 + [-float(i) for i in range(len(SPM) - 259)]
    # b and c are joined first of all, so that neither ab nor cd is made of abcd.
    scores[SPM.index("bc")] = -0.5
    write_gguf(
        tmp_path / "tiny.gguf", sentencepiece_model(), Recipe("llama", tokenizer=sentencepiece(scores))
    )
    path = resolve_model(str(tmp_path / "tiny.gguf"))
    text = ModelText.from_directory(path)

    def pieces(words: str) -> list[str]:
        return [SPM[i] for i in text.encode(words)]

    assert pieces("abcd") == ["<s>", "\u2581a", "bc", "d"]
    assert pieces("cd ab") == ["<s>", "\u2581", "cd", "\u2581", "ab"]
    assert pieces("é<tool>") == ["<s>", "\u2581", "<0xC3>", "<0xA9>", "<tool>"]
    for words in ("abcd", "a  b", " a", "cé漢🙂d"):
        assert text.decode(text.encode(words)) == words
    assert json.loads((path / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_sentencepiece_without_an_order_is_refused(tmp_path: Path, cache: Path) -> None:
    tokenizer = sentencepiece([0.0] * len(SPM))
    write_gguf(tmp_path / "tiny.gguf", sentencepiece_model(), Recipe("llama", tokenizer=tokenizer))
    assert_refused(tmp_path / "tiny.gguf", "equal scores, which are not supported", cache)


def test_end_tokens(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), Recipe("llama", more_keys=key(EOT, 0)))
    assert served(tmp_path / "tiny.gguf").spec.eos_token_ids == (2, 0)


EOT = "tokenizer.ggml.eot_token_id"
