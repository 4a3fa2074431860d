"""The whole engine on Triton's kernels, interpreted, where requests share prefixes: token for token what
torch alone gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from chiron_engine import LLM, SamplingParams
from chiron_engine.config import EngineConfig
from chiron_engine.model.attention import AttentionBatch
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.triton_attention import TritonAttention
from chiron_engine.runtime.build import build_executor
from tests.cli.tiny_llama import write_tiny_llama
from tests.triton_interpreter import install

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the engine on the GPU")

BLOCK = 16
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "block_size": BLOCK,
    "kv_cache_memory": 1 << 18,
    "swap_space": 1 << 17,
    "max_num_seqs": 5,
    "max_num_batched_tokens": 24,
}


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


def drawn(count: int, seed: int) -> SamplingParams:
    return SamplingParams(temperature=1.1, top_k=20, seed=seed, max_tokens=count, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    install()
    return str(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[AttentionBatch]]:
    """What the backend was given in each forward pass."""
    seen: list[AttentionBatch] = []
    begin = TritonAttention.begin

    def recorded(self: TritonAttention, batch: AttentionBatch, pool: KvPool) -> None:
        seen.append(batch)
        begin(self, batch, pool)

    monkeypatch.setattr(TritonAttention, "begin", recorded)
    yield seen


def sizes(batch: AttentionBatch) -> list[int]:
    """Members of each group of the step, fewest first."""
    return [] if batch.cascade is None else sorted(batch.cascade.starts.diff().tolist())


SYSTEM = "You are an engine that answers in few words, all of which are in the question: "
OTHER = "Count the letters of what follows, and say no more: "
PROMPTS = [
    (SYSTEM + "why?", greedy(9)),
    (OTHER + "one", greedy(14)),
    (SYSTEM + "and what for, or whom?", drawn(12, seed=3)),
    ("nothing in common", greedy(11)),
    (SYSTEM + "when?", greedy(5)),
    (OTHER + "another one", drawn(8, seed=4)),
    (SYSTEM + "where, then?", greedy(16)),
    (SYSTEM + "who?", greedy(10)),
]


def outputs_of(model: str, **options: Any) -> list[tuple[list[int], str | None]]:
    """Of requests that find their prefixes computed: the first call leaves them in the cache, without which
    no two of them would have the same blocks."""
    with LLM(model, **{**SMALL, **options}) as llm:
        llm.generate([SYSTEM, OTHER], greedy(1))
        outputs = llm.generate([prompt for prompt, _ in PROMPTS], [sampling for _, sampling in PROMPTS])
    return [(output.token_ids, output.finish_reason) for output in outputs]


def test_tokens_are_those_of_torch(model: str, steps: list[AttentionBatch]) -> None:
    """Requests join and leave, groups grow and vanish, and chunks run beside them."""
    found = outputs_of(model, kernels="triton", cascade_min_tokens=2 * BLOCK)
    assert found == outputs_of(model, kernels="torch")
    groups = [sizes(batch) for batch in steps if batch.num_decodes]
    assert [] in groups and any(len(of_step) == 2 for of_step in groups)
    assert max(max(of_step, default=0) for of_step in groups) >= 3
    assert any(batch.cascade is not None and batch.chunks for batch in steps)
    assert any(batch.cascade is not None and not batch.chunks for batch in steps)
    partly = [batch for batch in steps if batch.cascade and not batch.cascade.everyone]
    assert partly and any(batch.cascade.everyone for batch in steps if batch.cascade)


def test_without_where_it_does_not_pay(model: str, steps: list[AttentionBatch]) -> None:
    with LLM(model, kernels="triton", **SMALL) as llm:
        llm.generate([SYSTEM], greedy(1))
        llm.generate([SYSTEM + "a", SYSTEM + "b"], greedy(2))
    assert steps and all(batch.cascade is None for batch in steps)


@pytest.mark.parametrize(
    ("options", "looks"),
    [
        ({}, True),
        ({"disable_cascade_attn": True}, False),
        ({"enable_prefix_caching": False}, False),
        ({"kernels": "torch"}, False),
    ],
)
def test_who_looks_for_prefixes(options: dict[str, Any], looks: bool, model: str) -> None:
    config = EngineConfig(model, **{"kernels": "triton", **SMALL, **options})
    executor, _ = build_executor(config)
    assert (executor.prefixes is not None) == looks
    executor.close()
