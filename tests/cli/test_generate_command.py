"""`chiron generate`, offline and against a server: the same answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.chiron_process import SMALL, Server, chiron

GREEDY = ["--temperature", "0", "--max-tokens", "6", "--ignore-eos"]


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[str]:
    with Server(["serve", str(tiny_llama), "--grpc-port", "0", "--dtype", "float32", *SMALL]) as running:
        words = running.wait_ready().split()
        yield words[words.index("--server") + 1]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_offline_and_remote_give_the_same_tokens(tiny_llama: Path, server: str) -> None:
    prompts = ["hello", "a longer prompt about nothing", "ünïcode"]
    offline = chiron("generate", str(tiny_llama), "--dtype", "float32", *SMALL, "--json", *GREEDY, *prompts)
    remote = chiron("generate", "--server", server, "--json", *GREEDY, *prompts)
    assert offline.returncode == remote.returncode == 0, offline.stderr + remote.stderr
    here, there = lines(offline.stdout), lines(remote.stdout)
    assert [line["prompt_token_ids"] for line in here] == [list(prompt.encode()) for prompt in prompts]
    for field in ("prompt_token_ids", "token_ids", "text", "finish_reason"):
        assert [line[field] for line in here] == [line[field] for line in there]
    assert here[0]["finish_reason"] == "length"
    assert len(here[0]["token_ids"]) == 6
    assert here[0]["timing"].keys() == there[0]["timing"].keys()
    assert all(line["timing"]["ttft_ms"] <= line["timing"]["total_ms"] for line in here + there)
    assert "load weights" in offline.stderr
    assert "\x1b" not in offline.stderr  # no bar where standard error is no terminal


def test_logprobs_and_penalties_are_the_same_here_and_there(tiny_llama: Path, server: str) -> None:
    asked = [*GREEDY, "--logprobs", "2", "--frequency-penalty", "1.5", "--logit-bias", "118=-100"]
    offline = chiron("generate", str(tiny_llama), "--dtype", "float32", *SMALL, "--json", *asked, "hello")
    remote = chiron("generate", "--server", server, "--json", *asked, "hello")
    assert offline.returncode == remote.returncode == 0, offline.stderr + remote.stderr
    (here,), (there,) = lines(offline.stdout), lines(remote.stdout)
    assert here["token_ids"] == there["token_ids"]
    assert len(here["logprobs"]) == len(there["logprobs"]) == 6
    for mine, theirs in zip(here["logprobs"], there["logprobs"], strict=True):
        assert mine["top_ids"] == theirs["top_ids"] and len(mine["top_ids"]) == 2
        assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-5)
        assert mine["logprob"] <= mine["top_logprobs"][0] + 1e-6 < 1e-5
    plain = lines(chiron("generate", "--server", server, "--json", *GREEDY, "hello").stdout)[0]
    assert plain["logprobs"] is None
    assert plain["token_ids"] != here["token_ids"]


def test_the_prompt_is_scored_here_and_there(tiny_llama: Path, server: str) -> None:
    """As an output that is the same text is, token by token."""
    asked = [*GREEDY, "--prompt-logprobs", "2"]
    offline = chiron("generate", str(tiny_llama), "--dtype", "float32", *SMALL, "--json", *asked, "hello")
    remote = chiron("generate", "--server", server, "--json", *asked, "hello")
    assert offline.returncode == remote.returncode == 0, offline.stderr + remote.stderr
    (here,), (there,) = lines(offline.stdout), lines(remote.stdout)
    assert len(here["prompt_logprobs"]) == len(there["prompt_logprobs"]) == 4
    for mine, theirs in zip(here["prompt_logprobs"], there["prompt_logprobs"], strict=True):
        assert mine["top_ids"] == theirs["top_ids"] and len(mine["top_ids"]) == 2
        assert mine["rank"] == theirs["rank"] >= 1
        assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-5)
    forced = ["--json", "--max-tokens", "1", "--logprobs", "0", "--regex", "o", "hell"]
    (as_output,) = lines(chiron("generate", "--server", server, *forced).stdout)
    last = here["prompt_logprobs"][-1]
    assert as_output["logprobs"][0]["logprob"] == pytest.approx(last["logprob"], abs=1e-4)
    plain = lines(chiron("generate", "--server", server, "--json", *GREEDY, "hello").stdout)[0]
    assert plain["prompt_logprobs"] is None


def test_an_output_follows_a_guide_here_and_there(tiny_llama: Path, server: str, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no", 17]}')
    asked = ["--temperature", "0", "--max-tokens", "20", "--json-schema", f"@{schema}", "hello"]
    offline = chiron("generate", str(tiny_llama), "--dtype", "float32", *SMALL, *asked)
    remote = chiron("generate", "--server", server, *asked)
    assert offline.stdout == remote.stdout
    assert json.loads(remote.stdout) in ("yes", "no", 17)
    refused = chiron("generate", "--server", server, "--regex", "((", "hello")
    assert refused.returncode == 2
    assert "regex cannot be followed" in refused.stderr
    handle = chiron("generate", "--server", server, "--max-tokens", "9", "--regex", "@[a-c]{2}", "hello")
    assert re.fullmatch("@[a-c]{2}\n", handle.stdout)
    missing = chiron("generate", "--server", server, "--grammar", "@/no/such/file", "hello")
    assert missing.returncode == 2
    assert "cannot read /no/such/file" in missing.stderr


def test_prompts_from_a_file_and_from_standard_input(server: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    from_file = chiron("generate", "--server", server, "--json", *GREEDY, "--file", str(file))
    piped = chiron("generate", "--server", server, "--json", *GREEDY, stdin="one\n\ntwo\n")
    assert [bytes(line["prompt_token_ids"]) for line in lines(from_file.stdout)] == [b"one", b"two"]
    assert [line["token_ids"] for line in lines(piped.stdout)] == [
        line["token_ids"] for line in lines(from_file.stdout)
    ]


def test_a_server_streams_text(server: str) -> None:
    whole = lines(chiron("generate", "--server", server, "--json", *GREEDY, "--chat", "hello").stdout)[0]
    streamed = chiron("generate", "--server", server, *GREEDY, "--chat", "hello")
    assert bytes(whole["prompt_token_ids"]) == b"user: hello\nassistant: "
    assert streamed.stdout == whole["text"] + "\n"


def test_service_levels_are_carried(server: str) -> None:
    levels = ["--slo-class", "batch", "--ttft-slo-ms", "60000", "--itl-slo-ms", "1000", "--timeout", "60"]
    assert chiron("generate", "--server", server, *levels, *GREEDY, "hi").returncode == 0
    refused = chiron("generate", "--server", server, "--ttft-slo-ms", "-1", *GREEDY, "hi")
    assert refused.returncode == 2
    assert "ttft_slo_ms" in refused.stderr


def test_what_the_server_refuses_is_reported_per_prompt(server: str) -> None:
    result = chiron("generate", "--server", server, "--json", *GREEDY, "fine", "x" * 5000)
    assert result.returncode == 1
    good, bad = lines(result.stdout)
    assert good["finish_reason"] == "length"
    assert "5000" in bad["error"]


def test_a_prompt_over_the_context_exits_2_offline(tiny_llama: Path) -> None:
    result = chiron("generate", str(tiny_llama), *SMALL, *GREEDY, "x" * 5000)
    assert result.returncode == 2
    assert "5000" in result.stderr


def test_an_expired_deadline_exits_1(server: str) -> None:
    result = chiron("generate", "--server", server, "--timeout", "0.001", *GREEDY, "hi")
    assert result.returncode == 1
    assert "DEADLINE_EXCEEDED" in result.stderr


def test_a_seed_makes_sampling_repeatable(server: str, tiny_llama: Path) -> None:
    sampled = ["--seed", "7", "--max-tokens", "8", "--ignore-eos", "--json", "hi"]
    first = lines(chiron("generate", "--server", server, *sampled).stdout)[0]["token_ids"]
    again = lines(chiron("generate", "--server", server, *sampled).stdout)[0]["token_ids"]
    offline = chiron("generate", str(tiny_llama), "--dtype", "float32", *SMALL, *sampled)
    assert first == again == lines(offline.stdout)[0]["token_ids"]
