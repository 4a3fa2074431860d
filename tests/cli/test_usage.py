"""What the command line refuses, with which exit code, and that it names the mistake."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chiron_engine.commands.engine_options import engine_config, to_arguments
from chiron_engine.commands.exits import CommandError
from chiron_engine.commands.local_engines import engine_command, gpus_of, local_engines
from chiron_engine.commands.sizes import format_size, parse_size
from chiron_engine.config import EngineConfig
from tests.cli.chiron_process import SMALL, chiron

USAGE = [
    (["frobnicate"], "frobnicate"),
    (["serve"], "MODEL"),
    (["serve", "m", "--engines", "0"], "--engines"),
    (["serve", "m", "--grpc-port", "70000"], "--grpc-port"),
    (["serve", "m", "--log-level", "loud"], "loud"),
    (["serve", "m", "--engines", "2", "--step-log", "steps.jsonl"], "--step-log is for one engine"),
    (["engine", "m", "--dtype", "int4"], "int4"),
    (["engine", "m", "--kv-cache-dtype", "fp4"], "fp4"),
    (["engine", "m", "--device", "gpu"], "gpu"),
    (["engine", "m", "--swap-space", "4"], "4GiB"),
    (["engine", "m", "--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization"),
    (["engine", "m", "--cascade-min-tokens", "0"], "--cascade-min-tokens"),
    (["engine", "m", "--disable-cascade-attn", "--cascade-min-tokens", "9"], "disable_cascade_attn"),
    (["engine", "m", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
    (["engine", "m", "--join", "nowhere"], "HOST:PORT"),
    (["engine", "m", "--join", "no.such.host.invalid:1"], "the host is unknown"),
    (["engine", "m", "--advertise-host", "here"], "--join"),
    (["coordinator", "m", "--max-engines", "2"], "add --engines"),
    (["generate"], "name a model"),
    (["generate", "m"], "no prompt"),
    (["generate", "m", "--file", "/no/such/file"], "/no/such/file"),
    (["generate", "m", "--file", "x", "prompt"], "not both"),
    (["generate", "m", "--temperature", "nan", "hi"], "temperature"),
    (["generate", "m", "--top-p", "0", "hi"], "top_p"),
    (["generate", "m", "--max-tokens", "0", "hi"], "max_tokens"),
    (["generate", "m", "--min-p", "2", "hi"], "min_p"),
    (["generate", "m", "--logit-bias", "15:-100", "hi"], "ID=BIAS"),
    (["generate", "m", "--logit-bias", "15=200", "hi"], "logit_bias[15] is 200"),
    (["generate", "m", "--slo-class", "batch", "hi"], "--slo-class"),
    (["generate", "--server", "127.0.0.1:1", "--slo-class", "gold", "hi"], "gold"),
    (["generate", "--server", "127.0.0.1:1", "--dtype", "float32", "hi"], "--dtype"),
    (["generate", "--server", "127.0.0.1:1"], "no prompt"),
    (["generate", "--server", "127.0.0.1:1", "--top-k", "-1", "hi"], "top_k"),
]


@pytest.mark.parametrize(("arguments", "words"), USAGE, ids=lambda value: " ".join(value)[:60])
def test_a_usage_error_exits_2_and_names_the_mistake(arguments: list[str], words: str) -> None:
    result = chiron(*arguments)
    assert result.returncode == 2, result.stderr
    flat = re.sub(r"[│\s]+", " ", result.stderr)
    assert words in flat
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_prompt_that_is_no_text_is_refused() -> None:
    command = [sys.executable, "-m", "chiron_engine", "generate", "--server", "127.0.0.1:1", b"caf\xe9"]
    result = subprocess.run(command, capture_output=True, timeout=60)
    assert result.returncode == 2
    assert b"prompt 1 is no valid text" in result.stderr


def test_a_stop_string_that_is_no_text_is_refused() -> None:
    command = [sys.executable, "-m", "chiron_engine", "generate", "--server", "127.0.0.1:1", "hi", "--stop"]
    result = subprocess.run([*command, b"caf\xe9"], capture_output=True, timeout=60)
    assert result.returncode == 2
    assert b"stop string 1 is no valid text" in result.stderr


def test_an_unreachable_server_exits_1() -> None:
    result = chiron("generate", "--server", "127.0.0.1:1", "hi")
    assert result.returncode == 1
    assert "no server answers at 127.0.0.1:1" in result.stderr


@pytest.mark.parametrize("command", [["serve"], ["engine"], ["generate"]], ids=lambda value: value[0])
def test_a_missing_model_exits_3(command: list[str]) -> None:
    more = ["hi"] if command == ["generate"] else ["--grpc-port", "0"]
    result = chiron(*command, "/no/such/model", *more)
    assert result.returncode == 3, result.stderr
    assert "/no/such/model" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_broken_model_exits_3_with_its_cause(tiny_llama: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config)[:-5])
    result = chiron("serve", str(broken), "--grpc-port", "0", *SMALL)
    assert result.returncode == 3, result.stderr
    assert "config.json" in result.stderr


@pytest.mark.parametrize("command", [["serve", "--grpc-port", "0"], ["generate"]], ids=lambda value: value[0])
def test_a_missing_tokenizer_exits_3(command: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    (broken / "tokenizer.json").unlink()
    more = ["hi"] if command == ["generate"] else []
    result = chiron(command[0], str(broken), *command[1:], *SMALL, *more)
    assert result.returncode == 3, result.stderr
    assert "tokenizer.json" in result.stderr


@pytest.mark.parametrize("command", [["serve", "--grpc-port", "0"], ["generate"]], ids=lambda value: value[0])
def test_too_little_memory_exits_4(command: list[str], tiny_llama: Path) -> None:
    more = ["hi"] if command == ["generate"] else []
    result = chiron(command[0], str(tiny_llama), *command[1:], "--kv-cache-memory", "900TiB", *more)
    assert result.returncode == 4, result.stderr
    assert "lower kv_cache_memory" in result.stderr


def test_a_setting_the_machine_cannot_have_exits_2(tiny_llama: Path) -> None:
    result = chiron("generate", str(tiny_llama), *SMALL, "--dtype", "float16", "--device", "cpu", "hi")
    assert result.returncode == 2, result.stderr
    assert "float16" in result.stderr


LIGHT = [["--help"], ["--version"], ["serve", "--help"], ["generate", "--server", "127.0.0.1:1", "hi"]]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_load_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from chiron_engine.cli import main\n"
        f"sys.argv = ['chiron', *{arguments!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit(len({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_a_command_loads_no_other_command() -> None:
    code = (
        "import sys; from chiron_engine.cli import COMMANDS, main\n"
        "sys.argv = ['chiron', 'engine', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "files = {name for name in COMMANDS.values() if f'chiron_engine.commands.{name}' in sys.modules}\n"
        "sys.exit(files != {'engine'})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2gb", 2 * 10**9), ("7B", 7), ("0GiB", 0)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["4", "-1GiB", "GiB", "1e3MiB", "1 XiB", "", "٤GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="amount of memory"):
        parse_size(text)


def test_sizes_are_shown_in_the_largest_unit() -> None:
    assert [format_size(n) for n in (12, 2048, 3 << 29)] == ["12 B", "2.0 KiB", "1.5 GiB"]


def test_an_engine_process_gets_the_same_configuration() -> None:
    config = EngineConfig(
        model="m",
        dtype="float32",
        kv_cache_memory=123456789,
        swap_space=0,
        enable_prefix_caching=False,
        max_num_seqs=3,
        gpu_memory_utilization=0.5,
        step_log="steps.jsonl",
        num_speculative_tokens=7,
        enforce_eager=True,
        kv_cache_dtype="fp8_e4m3",
    )
    arguments = to_arguments(config)
    assert arguments[0] == "m"
    given = dict(zip(arguments[1::2], arguments[2::2], strict=False))
    assert "--no-enable-prefix-caching" in arguments
    assert "--enforce-eager" in arguments
    assert parse_size(given["--kv-cache-memory"]) == 123456789
    assert arguments[arguments.index("--num-speculative-tokens") + 1] == "7"
    assert arguments[arguments.index("--kv-cache-dtype") + 1] == "fp8_e4m3"
    off = EngineConfig(model="m", disable_cascade_attn=True)
    assert to_arguments(off) == ["m", "--disable-cascade-attn"]
    shortest = EngineConfig(model="m", cascade_min_tokens=512)
    assert to_arguments(shortest) == ["m", "--cascade-min-tokens", "512"]
    assert to_arguments(engine_config("m", {})) == ["m"]
    assert EngineConfig(model="m") == engine_config("m", {})
    command = engine_command(config, 1000, "info")
    assert command[command.index("--threads") + 1] == "1000"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cascade_min_tokens": 0}, "cascade_min_tokens is 0; it must be at least 1"),
        ({"cascade_min_tokens": 1.5}, "cascade_min_tokens is 1.5; it must be a whole number"),
        (
            {"cascade_min_tokens": 64, "disable_cascade_attn": True},
            "cascade_min_tokens is 64; with disable_cascade_attn it must be None",
        ),
        (
            {"cascade_min_tokens": 64, "enable_prefix_caching": False},
            "cascade_min_tokens is 64; with prefix caching off it must be None",
        ),
    ],
)
def test_shared_prefixes_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EngineConfig(model="m", **options)


def test_guesses_for_a_request_are_bounded() -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens is 16; it must be between 0 and 15"):
        EngineConfig(model="m", num_speculative_tokens=16)


def test_types_of_kv_are_named() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype is 'e4m3'; it must be one of auto, fp8, fp8_e4m3"):
        EngineConfig(model="m", kv_cache_dtype="e4m3")


def test_engines_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiron_engine.cluster.gpus.usable_gpus", lambda: ["0", "1", "2"])
    config = EngineConfig(model="m")
    assert gpus_of(config) == ["0", "1", "2"]
    assert gpus_of(EngineConfig(model="m", device="cpu")) == []
    assert local_engines(config, 2, gpus_of(config), "info").gpus == ["0", "1", "2"]
    with pytest.raises(CommandError, match="4 engines take a GPU each and there are 3"):
        local_engines(config, 4, gpus_of(config), "info")
