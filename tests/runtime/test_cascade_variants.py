"""What is compiled for shared prefixes before the first request is all that they then ask for."""

from __future__ import annotations

import random
from collections.abc import Hashable
from typing import Any

import pytest
import torch
from chiron_kernels.gpu import prefill_plan
from chiron_kernels.gpu.launch import Launch
from tiny_causal_lm import VOCAB, TinyCausalLM

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.model.attention import AttentionBatch
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.triton_attention import TritonAttention
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY
from chiron_engine.runtime import cascade_variants
from chiron_engine.runtime.cascade_variants import launch_cascade_variants
from chiron_engine.runtime.shared_prefixes import CascadeRule, PrefixFinder
from chiron_engine.runtime.torch_executor import TorchExecutor
from chiron_engine.runtime.trial_steps import TrialRequests
from tests.triton_interpreter import install

BLOCK, SLOTS = 16, 6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Variant = tuple[Hashable, ...]


def make_executor(finder: PrefixFinder | None, blocks: int = 48) -> TorchExecutor:
    if DEVICE.type == "cpu":
        install()
    model = TinyCausalLM(device=str(DEVICE), kernels=Kernels.TRITON)
    pool = KvPool(blocks, BLOCK, model.spec.layers, torch.float32, DEVICE)
    return TorchExecutor(
        model, pool, None, max_slots=SLOTS, max_step_tokens=64, max_model_len=192, prefixes=finder
    )


@pytest.fixture
def in_cascade(monkeypatch: pytest.MonkeyPatch) -> set[Variant]:
    """Kernels of steps with groups that were launched, with their constants."""
    seen: set[Variant] = set()
    cascading = [False]
    run, begin = Launch.run, TritonAttention.begin

    def recorded(self: Launch) -> None:
        if cascading[0] and self.kernel.__name__ in (
            "_prefill_attention",
            "_merge_parts",
            "_merge_states",
            "_decode_attention",
            "_merge_splits",
        ):
            constants = [(name, value) for name, value in self.arguments.items() if name.isupper()]
            seen.add((self.kernel.__name__, self.num_warps, self.num_stages, *constants))
        run(self)

    def begun(self: TritonAttention, batch: AttentionBatch, pool: KvPool) -> None:
        cascading[0] = batch.cascade is not None and not batch.chunks
        begin(self, batch, pool)

    monkeypatch.setattr(Launch, "run", recorded)
    monkeypatch.setattr(TritonAttention, "begin", begun)
    return seen


def test_serving_asks_for_nothing_else(in_cascade: set[Variant], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_plan, "LEAST_SPLIT_KEYS", 32)
    monkeypatch.setattr(prefill_plan, "MOST_SPLITS", 2)
    monkeypatch.setattr(cascade_variants, "LONG_PREFIX", 64)
    finder = PrefixFinder(CascadeRule(BLOCK), BLOCK)
    executor = make_executor(finder)
    launch_cascade_variants(executor)
    assert executor.prefixes is finder
    ready = set(in_cascade)
    in_cascade.clear()
    core = EngineCore(executor, clock=VirtualClock())
    draw = random.Random(1)
    for length in (BLOCK + 2, 5 * BLOCK):
        prefix = [draw.randrange(VOCAB) for _ in range(length)]
        for count in (1, 2, 5):
            for number in range(count):
                tail = [draw.randrange(VOCAB) for _ in range(number + 1)]
                core.add(Request(length * 10 + count * 100 + number, prefix + tail, GREEDY, 4 + number))
            while core.has_work:
                core.step()
    core.close()
    assert {name for name, *_ in in_cascade} >= {"_prefill_attention", "_merge_parts", "_merge_states"}
    assert in_cascade <= ready
    assert {dict(rest)["PLACED"] for name, _, _, *rest in ready if name == "_merge_states"} == {False, True}


def test_blocks_that_are_shared_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool with room for 2 requests of this length has room for 4 that share nearly all of it."""
    tried = []

    class Recorded(TrialRequests):
        def __init__(self, *arguments: Any, sharers: int, shared: int) -> None:
            tried.append((shared, sharers))
            super().__init__(*arguments, sharers=sharers, shared=shared)

    monkeypatch.setattr(cascade_variants, "TrialRequests", Recorded)
    monkeypatch.setattr(cascade_variants, "LONG_PREFIX", 10 * BLOCK)
    launch_cascade_variants(make_executor(PrefixFinder(CascadeRule(BLOCK), BLOCK), blocks=24))
    assert set(tried) == {(1, 2), (1, 4), (10, 2), (10, 4)}


def test_nothing_where_no_prefixes_are_looked_for(in_cascade: set[Variant]) -> None:
    launch_cascade_variants(make_executor(None))
    assert not in_cascade
