"""The text side: special tokens, chat templates, and what templates may not do."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from chiron_engine.gateway.chat_template import ChatTemplate, TemplateFailure
from chiron_engine.gateway.text import ModelFilesError, ModelText, TextError
from tests.gateway.tiny_model import END, write_tiny_model

MESSAGES = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "<b>"}]


def configure(directory: Path, **values: Any) -> Path:
    write_tiny_model(directory)
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return directory


def test_encodes_and_decodes(tmp_path: Path) -> None:
    text = ModelText.from_directory(write_tiny_model(tmp_path))
    assert text.encode("hé\0") == [*"hé\0".encode()]
    assert text.decode(text.encode("a👍b")) == "a👍b"
    assert text.decode([104, END]) == "h"
    assert text.decode([104, END], skip_special_tokens=False) == "h<|end|>"
    with pytest.raises(TextError, match="lone surrogate at character 1"):
        text.encode("a\ud800")
    with pytest.raises(TextError, match="token id 257"):
        text.decode([257])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [97]),
        ({"add_bos_token": True, "bos_token": "<|end|>"}, [END, 97]),
        ({"add_bos_token": True, "bos_token": {"content": "<|end|>"}}, [END, 97]),
        ({"add_bos_token": False, "add_eos_token": True, "eos_token": "<|end|>"}, [97, END]),
        ({"add_bos_token": True}, [97]),
    ],
)
def test_special_tokens_follow_the_configuration(
    tmp_path: Path, config: dict[str, Any], expected: list[int]
) -> None:
    text = ModelText.from_directory(configure(tmp_path, **config))
    assert text.encode("a") == expected
    assert text.encode("a", add_special_tokens=False) == [97]


def test_the_template_comes_from_its_file_or_the_configuration(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "from the list"}]
    directory = configure(tmp_path, chat_template=several)
    assert ModelText.from_directory(directory).render_chat(MESSAGES) == "from the list"
    (directory / "chat_template.jinja").write_text("from the file")
    assert ModelText.from_directory(directory).render_chat(MESSAGES) == "from the file"


def test_without_a_template_chat_is_refused(tmp_path: Path) -> None:
    text = ModelText.from_directory(write_tiny_model(tmp_path, chat_template=None))
    assert not text.has_chat_template
    with pytest.raises(TextError, match="no chat template"):
        text.encode_chat(MESSAGES)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{", "is no tokenizer"),
        ("tokenizer_config.json", "[", "cannot be read"),
        ("tokenizer_config.json", "[]", "no JSON object"),
        ("chat_template.jinja", "{% if %}", "does not compile"),
        ("tokenizer_config.json", '{"add_bos_token": true, "bos_token": "<none>"}', "does not know"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    write_tiny_model(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelFilesError, match=says):
        ModelText.from_directory(tmp_path)


def render(source: str, messages: list[dict[str, str]] = MESSAGES, **options: Any) -> str:
    return ChatTemplate(source).render(messages, {"bos_token": "<s>"}, **options)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>hé"),
        ("{% if add_generation_prompt %}\n  yes\n{% endif %}\n", "  yes\n"),
        ("{{ messages[1] | tojson }}", '{"role": "assistant", "content": "<b>"}'),
        ("{{ messages[0].content | tojson }}", '"hé"'),
        ("{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{{ tools is none }}{{ undefined_name }}", "True"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
    ],
)
def test_renders_as_templates_expect(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ range(1000000000) }}",
        "{{ 10 ** 1000000000 }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * messages }}",
        "{{ messages[7].content.x }}",
        "{{ 1 / 0 }}",
    ],
)
def test_refuses_at_once(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateFailure) as failure:
        render(source)
    assert time.monotonic() - started < 1.0
    assert "0x" not in str(failure.value)


def test_endless_loops_are_cut_off() -> None:
    """Nested loops that print nothing, so that only the clock can end them."""
    many = [{"role": "user", "content": "x"}] * 2000
    loops = "{% for a in messages %}" * 4 + "{% endfor %}" * 4
    started = time.monotonic()
    with pytest.raises(TemplateFailure, match=r"took over 0\.2 s"):
        render(loops, many, max_seconds=0.2)
    assert time.monotonic() - started < 2.0


def test_endless_output_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiron_engine.gateway.chat_template.MAX_OUTPUT_CHARS", 10_000)
    many = [{"role": "user", "content": "x" * 1000}] * 100
    with pytest.raises(TemplateFailure, match="10000 characters"):
        render("{% for m in messages %}{{ m.content }}{% endfor %}", many)


def test_a_long_text_is_refused_by_its_length_only_when_surely_too_long(tmp_path: Path) -> None:
    text = ModelText.from_directory(write_tiny_model(tmp_path))
    longest = len("<|end|>")
    assert not text.surely_over("<|end|>" * 10, 10)
    assert len(text.encode("<|end|>" * 10)) == 10
    assert text.surely_over("a" * (longest * 10 + 1), 10)
