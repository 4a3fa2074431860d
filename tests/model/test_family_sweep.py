"""The sweep over model families, on a few types that differ in what they ask of attention."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from chiron_engine.model.attention import TorchAttention
from chiron_engine.model.compiled_attention import CompiledAttention
from scripts.family_sweep import check, isolation
from scripts.family_sweep.check import FAILED, PASSED, REFUSED, Outcome, check_type
from scripts.family_sweep.isolation import check_apart
from scripts.family_sweep.report import as_markdown, counts

Attend = Callable[..., torch.Tensor]
# Which of them serves is the machine's matter.
BACKENDS: tuple[Any, ...] = (TorchAttention, CompiledAttention)

# By model type: what is special about it, its result, and a part of the reason.
SAMPLE: dict[str, tuple[str, str, str]] = {
    "mistral": ("window, native decoder too", PASSED, ""),
    "gemma2": ("soft caps, alternating windows", PASSED, ""),
    "gpt_oss": ("sinks, experts", PASSED, ""),
    "qwen2_moe": ("experts, window only in the mask", PASSED, ""),
    "deepseek_v3": ("latent attention", PASSED, ""),
    "mimo_v2_flash": ("values narrower than keys, sinks", PASSED, ""),
    "cohere": ("attention beside the feed-forward layer", PASSED, ""),
    "gpt2": ("learned positions", PASSED, ""),
    "bert": ("an encoder as a decoder", PASSED, "is_decoder=False refused"),
    "gemma4_text": ("head sizes differ by layer", PASSED, ""),
    "zamba2": ("recurrent state", REFUSED, "'hybrid'"),
    "llama4_text": ("attention in chunks", REFUSED, "chunked_attention"),
    "diffllama": ("attention twice a layer", REFUSED, "twice"),
    "doge": ("a mask of its own", REFUSED, "plain causal attention"),
    "roberta": ("positions from padding", REFUSED, "padding id"),
}


@pytest.fixture(autouse=True)
def one_thread_and_own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("CHIRON_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", SAMPLE)
def test_outcome(kind: str) -> None:
    _, result, reason = SAMPLE[kind]
    outcome = check_type(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    assert outcome.result == result, outcome.reason
    assert reason in outcome.reason if reason else not outcome.reason


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_wrong_tokens_fail(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here backends that forget windows, with nothing before them that would notice."""

    def forgetting(attend: Attend) -> Attend:
        def forgetful(self: Any, *arguments: Any) -> torch.Tensor:
            *others, rule = arguments
            return attend(self, *others, replace(rule, window=None))

        return forgetful

    for backend in BACKENDS:
        monkeypatch.setattr(backend, "attend", forgetting(backend.attend))
    monkeypatch.setattr(check, "check_supported", lambda config: None)
    monkeypatch.setattr("chiron_engine.model.self_check.check_architecture", lambda config: None)
    outcome = check_type(kind, "")
    assert outcome.result == FAILED
    assert "which eager attention prefers by" in outcome.reason


def test_what_differs_is_refused_by_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncapping(attend: Attend) -> Attend:
        def uncapped(self: Any, *arguments: Any) -> torch.Tensor:
            *others, rule = arguments
            return attend(self, *others, replace(rule, softcap=None))

        return uncapped

    for backend in BACKENDS:
        monkeypatch.setattr(backend, "attend", uncapping(backend.attend))
    outcome = check_type("gemma2", "")
    assert outcome.result == REFUSED
    assert "differs from its own eager attention" in outcome.reason


def test_a_crash_or_a_hang_is_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "check_type", lambda kind, architecture: os._exit(7))
    assert check_apart("llama", "Llama", 60) == Outcome(
        "llama", "Llama", FAILED, "its process ended with code 7"
    )
    monkeypatch.setattr(isolation, "check_type", lambda kind, architecture: time.sleep(60))
    assert check_apart("llama", "Llama", 0.1).reason == "no answer within 0.1 s"
    answer = Outcome("llama", "Llama", PASSED)
    monkeypatch.setattr(isolation, "check_type", lambda kind, architecture: answer)
    assert check_apart("llama", "Llama", 60) == answer


def test_page() -> None:
    outcomes = [Outcome("a", "A", PASSED), Outcome("b", "B", REFUSED, "x | y")]
    page = as_markdown(outcomes, "2026-11-23", "sweep")
    assert counts(outcomes) == "2 model types: 1 passed, 1 refused, 0 failed"
    assert page.endswith("| a | A | passed |  |\n| b | B | refused | x \\| y |\n")
    assert all(part in page for part in ("2026-11-23", "    sweep\n", torch.__version__.partition("+")[0]))
