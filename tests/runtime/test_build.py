"""From a configuration to an executor, on a model of random weights, under the real core."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.requests import build_request
from chiron_engine.model import cpu_kernels, loader
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.loader import default_precision
from chiron_engine.model.precision import BFLOAT16, FLOAT32, INT8
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.prefills import SCORED_TOKENS
from chiron_engine.policy.iteration.request import Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.runtime import build, trial_steps
from chiron_engine.runtime.build import build_executor, named_precision, resolve_device
from chiron_engine.runtime.errors import OutOfMemory
from chiron_engine.runtime.graph_capture import GraphCapture
from chiron_engine.runtime.torch_executor import TorchExecutor
from chiron_engine.runtime.trial_steps import (
    TrialRequests,
    measure_step_costs,
    measure_swap_costs,
    run_largest_step,
)
from scripts.gpu_suite.random_llama import write_random_llama

SAMPLED = SamplingParams(temperature=0.9, top_k=50, top_p=0.9)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_random_llama(path, "tiny", torch.device("cpu"))
    return EngineConfig(
        str(path),
        device="cpu",
        dtype="float32",
        kv_cache_memory=1 << 20,
        swap_space=1 << 20,
        max_num_seqs=8,
        threads=1,
    )


@pytest.fixture
def executor(config: EngineConfig) -> Iterator[TorchExecutor]:
    built, _ = build_executor(config)
    yield built
    built.close()


def test_phases_are_reported_in_order(config: EngineConfig) -> None:
    seen: list[tuple[str, float]] = []
    executor, spec = build_executor(config, lambda phase, fraction: seen.append((phase, fraction)))
    done = [phase for phase, fraction in seen if fraction == 1.0]
    assert done[0] == "load weights"
    assert done[1].startswith("KV cache of 128 blocks = 2,048 tokens = 4.0 requests of 512 tokens")
    assert done[2] == "warm up"
    assert spec.max_model_len == 512
    shape = executor.shape
    assert (shape.num_device_blocks, shape.num_host_blocks, shape.max_slots) == (128, 128, 8)
    assert (shape.block_size, shape.max_step_tokens, shape.vocab_size) == (16, 512, 512)
    assert shape.pipeline_depth == 1


def run_core(prompts: list[list[int]], core: EngineCore, max_tokens: int = 24) -> list[Request]:
    requests = [
        build_request(
            number,
            tokens,
            replace(SAMPLED, seed=sum(tokens), max_tokens=max_tokens),
            shape=core.shape,
            eos_token_ids=(),
            draw_seed=lambda: 0,
            arrival=0.0,
            slo=Slo(SloClass.BATCH),
        )
        for number, tokens in enumerate(prompts)
    ]
    for request in requests:
        core.add(request)
    for step in range(10_000):
        if not core.has_work:
            break
        if step == 12 and core.shape.max_slots == 8:
            core.set_limits(2, 64, "preempt")
        if step == 30 and core.shape.max_slots == 8:
            core.set_limits(8, 512)
        core.step()
    return requests


def test_a_core_with_too_little_room_yields_what_each_request_yields_alone(config: EngineConfig) -> None:
    """Sampled streams under preemption, swaps, prefix hits and a shrinking batch."""
    prompts = [[(7 * i + j) % 500 for j in range(5 + 9 * i)] for i in range(10)]
    prompts += [[*prompts[4], 3], [*prompts[9], 1, 2]]
    small, _ = build_executor(replace(config, kv_cache_memory=24 * 8192, max_model_len=256))
    core = EngineCore(small)
    together = run_core(prompts, core)
    assert core.load().preemptions > 0
    assert core.load().free_blocks == core.load().total_blocks
    alone, _ = build_executor(config)
    for request, tokens in zip(together, prompts, strict=True):
        only = run_core([tokens], EngineCore(alone, enable_prefix_caching=False))[0]
        assert list(request.output_ids) == list(only.output_ids)
        assert len(only.output_ids) == 24
    small.close()
    alone.close()


def test_swap_costs_are_measured(executor: TorchExecutor) -> None:
    costs = measure_swap_costs(executor)
    assert 0 < costs.copy_out_s < 1
    assert 0 < costs.copy_in_s < 1
    assert 0 < costs.recompute_s < 1


def test_recomputation_is_not_timed_where_it_follows_from_step_costs(
    executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(TorchExecutor, "submit")
    known = StepCosts(base_s=0.256, per_prompt_token_s=0.002)
    assert measure_swap_costs(executor, known).recompute_s == pytest.approx(0.002 + 0.256 / 256)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"kv_cache_memory": 10 * 8192},
        {"kv_cache_memory": 91 * 8192},
        {"kv_cache_memory": 2 * 8192, "max_model_len": 16},
        {"max_num_seqs": 1},
        {"max_num_seqs": 3, "max_num_batched_tokens": 3},
        {"max_model_len": 2, "block_size": 1, "max_num_seqs": 1, "max_num_batched_tokens": 1},
    ],
)
def test_step_costs_are_timed_on_engines_of_any_size(config: EngineConfig, sizes: dict[str, int]) -> None:
    executor, _ = build_executor(replace(config, **sizes))
    costs = measure_step_costs(executor)
    assert 0 < costs.base_s < 1
    assert 0 < costs.seconds(4, 400, 16) < 1
    executor.close()


@pytest.mark.parametrize("sizes", [{}, {"max_num_seqs": 1}, {"max_num_seqs": 5, "max_num_batched_tokens": 5}])
def test_the_largest_step_has_every_row_sampled_scored_and_guided(
    config: EngineConfig, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, _ = build_executor(replace(config, **sizes))
    slots, tokens = executor.shape.max_slots, executor.shape.max_step_tokens
    forward, passes, guided = executor.model.forward, [], []

    def note_forward(input_ids, positions, batch, pool, rows):
        passes.append((len(input_ids), len(rows)))
        return forward(input_ids, positions, batch, pool, rows)

    monkeypatch.setattr(executor.model, "forward", note_forward)
    monkeypatch.setattr(
        trial_steps, "forbid", lambda logits, rows, masks, kernels: guided.append(logits.shape)
    )
    run_largest_step(executor)
    prompt = min(tokens // slots, 511) * slots
    assert passes == [(prompt, slots + min(SCORED_TOKENS, prompt - slots)), (slots, slots)]
    assert guided == [(slots, 512)]
    executor.close()


def test_trial_requests_that_do_not_fit_are_refused(executor: TorchExecutor) -> None:
    with pytest.raises(ValueError, match="9 slots"):
        TrialRequests(executor, 9, 4, 1)
    with pytest.raises(ValueError, match="132 blocks"):
        TrialRequests(executor, 4, 512, 1)


def test_the_context_shrinks_to_a_small_pool(config: EngineConfig) -> None:
    executor, _ = build_executor(replace(config, kv_cache_memory=10 * 8192))
    assert executor.shape.max_model_len == 160
    executor.close()


def test_the_smallest_engine_there_is(config: EngineConfig) -> None:
    least = replace(
        config, max_model_len=2, block_size=1, max_num_seqs=1, max_num_batched_tokens=1, swap_space=0
    )
    executor, _ = build_executor(least)
    request = run_core([[5]], EngineCore(executor), max_tokens=1)[0]
    assert len(request.output_ids) == 1
    assert measure_swap_costs(executor) == SwapCosts()
    executor.close()


def test_too_little_memory_is_named(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfMemory, match="one request of 512 tokens"):
        build_executor(replace(config, kv_cache_memory=10 * 8192, max_model_len=512))
    with pytest.raises(OutOfMemory, match="lower kv_cache_memory or swap_space") as caught:
        build_executor(replace(config, kv_cache_memory=1 << 50))
    assert caught.value.needed == (1 << 50) + (1 << 20)
    monkeypatch.setattr(build, "available_bytes", lambda: 1000)
    with pytest.raises(OutOfMemory, match="loading tiny"):
        build_executor(config)


def test_shared_prefixes_need_the_kernels_that_read_them() -> None:
    config = EngineConfig(model="smollm2", device="cpu", kernels="torch", cascade_min_tokens=64)
    with pytest.raises(ValueError, match="cascade_min_tokens is 64, which needs Triton's kernels"):
        build_executor(config)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", ""])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="auto, cpu, cuda"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        resolve_device("cuda:0")
    assert resolve_device("auto") == torch.device("cpu")


def test_precisions(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert named_precision("bfloat16", cpu) is BFLOAT16 and named_precision("auto", cpu) is None
    monkeypatch.setattr(build, "why_not_int8", lambda device: None)
    monkeypatch.setattr(loader, "why_not_int8", lambda device: None)
    assert named_precision("int8", cpu) is INT8 is default_precision(Path(config.model), cpu)
    with pytest.raises(ValueError, match="float16, which is for CUDA"):
        named_precision("float16", cpu)
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        named_precision("int4", cpu)


def test_without_what_int8_needs_it_is_refused_and_not_the_default(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(cpu_kernels, "has_vnni", lambda: False)
    monkeypatch.setattr(cpu_kernels, "open_kernels", lambda: ctypes.CDLL(None))
    with pytest.raises(ValueError, match="lacks avx512_vnni"):
        named_precision("int8", cpu)
    assert default_precision(Path(config.model), cpu) is FLOAT32
    monkeypatch.setattr(cpu_kernels, "open_kernels", lambda: "there is no C compiler")
    with pytest.raises(ValueError, match="no C compiler"):
        named_precision("int8", cpu)


def test_a_cuda_pool_leaves_room_for_steps_and_what_else_is_there(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arithmetic, with a pretended device: 1 GiB in use out of 10, a step of 64 MiB, of which the trial's
    own pool is 40 blocks. Only torch's attention gathers and masks, only Triton's penalties put logits down
    beside the tokens of all slots."""
    cpu = torch.device("cpu")
    gib = 1 << 30
    model = build_executor(config)[0].model
    for name, value in {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device: 136 << 20,
        "max_memory_allocated": lambda device: 200 << 20,
        "mem_get_info": lambda device: (9 * gib, 10 * gib),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(build, "run_largest_step", lambda executor: None)  # interpreted, it takes long
    config, eager = replace(config, kv_cache_memory=None, gpu_memory_utilization=0.5), GraphCapture(None)
    masks = 512 * 512 * 6
    history = 8 * 512 * 4
    left = 5 * gib - gib - (64 << 20) + 40 * 8192 - history - build.CUDA_RESERVE
    model.kernels = Kernels.TRITON
    assert build._cuda_pool_bytes(config, 16, model, cpu, eager) == left - history
    short = replace(config, max_model_len=100)
    assert build._cuda_pool_bytes(short, 16, model, cpu, eager) == left + history - 2 * 8 * 100 * 4
    model.kernels = Kernels.TORCH
    pool = build._cuda_pool_bytes(config, 16, model, cpu, eager)
    assert pool == int((left - masks) / (1 + build.GATHERED_LAYERS / 2))
    with pytest.raises(OutOfMemory, match="lower kv_cache_memory"):
        build._cuda_pool_bytes(replace(config, kv_cache_memory=9 * gib), 16, model, cpu, eager)


def test_a_cuda_pool_leaves_room_for_what_graphs_keep(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arithmetic, with a pretended device of 10 GiB, on which graphs take 96 MiB and a step 64."""
    cpu = torch.device("cpu")
    gib = 1 << 30
    captured: list[TorchExecutor] = []

    class Capture(GraphCapture):
        def apply(self, executor: TorchExecutor) -> None:
            captured.append(executor)

    model = build_executor(config)[0].model
    model.kernels = Kernels.TRITON
    for name, value in {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device: 136 << 20,
        "max_memory_allocated": lambda device: 200 << 20,
        "mem_get_info": lambda device: (9 * gib - (96 << 20) * len(captured), 10 * gib),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(build, "run_largest_step", lambda executor: None)  # interpreted, it takes long
    config = replace(config, kv_cache_memory=None, gpu_memory_utilization=0.5)
    without = build._cuda_pool_bytes(config, 16, model, cpu, GraphCapture(None))
    monkeypatch.setattr(TorchExecutor, "close", lambda executor: captured.clear())
    assert build._cuda_pool_bytes(config, 16, model, cpu, Capture(lambda: lambda work: work)) == without - (
        96 << 20
    )
