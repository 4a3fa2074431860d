"""The executor on a CUDA device: the same tokens as recomputation, with two steps under way."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plan_driver import PlanDriver, trip_to_the_host
from tiny_causal_lm import VOCAB, TinyCausalLM

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.requests import build_request
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.precision import BFLOAT16
from chiron_engine.policy.iteration.plan import BlockCopy, TokenLogprobs
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY, SamplingParams
from chiron_engine.runtime.build import build_executor
from chiron_engine.runtime.kv_transfer import KvTransfer
from chiron_engine.runtime.logit_adjustments import AdjustmentTable
from chiron_engine.runtime.sampler import SamplingTable, sample
from chiron_engine.runtime.token_logprobs import LogprobTable, logprobs_of
from chiron_engine.runtime.torch_executor import TorchExecutor
from tests.model.quantised_attention import TIGHT_SCALES, reference, shortfall, write_scales

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BLOCK = 4
SAMPLED = SamplingParams(temperature=1.2, top_k=40, top_p=0.95)
PENALISED = SamplingParams(
    temperature=0.0,
    repetition_penalty=1.3,
    frequency_penalty=0.5,
    presence_penalty=0.2,
    min_tokens=4,
    logit_bias={7: 2.5, 11: -100.0},
)


@pytest.fixture(params=[Kernels.TRITON, Kernels.TORCH], ids=lambda kernels: kernels.value)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found: Kernels = request.param
    return found


def make_executor(kernels: Kernels, blocks: int = 64, host_blocks: int = 32) -> TorchExecutor:
    model = TinyCausalLM(device="cuda", kernels=kernels)
    pool = KvPool(blocks, BLOCK, model.spec.layers, torch.float32, "cuda")
    pool.storage.view(torch.float32).fill_(torch.nan)
    host = KvPool(host_blocks, BLOCK, model.spec.layers, torch.float32, "cpu", pinned=True)
    return TorchExecutor(model, pool, host, max_slots=6, max_step_tokens=64, max_model_len=128)


def prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCAB) for _ in range(length)]


def check(model: TinyCausalLM, tokens: list[int], known: int) -> None:
    """Each token is the best after those before it, or within 1e-3 of it."""
    for length in range(known, len(tokens)):
        logits = model.logits_of(tokens[:length])
        assert float(logits.max() - logits[tokens[length]]) < 1e-3


def test_mixed_steps_and_a_trip_to_the_host(kernels: Kernels) -> None:
    executor = make_executor(kernels)
    driver = PlanDriver(executor)
    first, second = driver.join(1, prompt(9, 1)), driver.join(2, prompt(5, 2))
    driver.step({1: 4, 2: 5})
    driver.step({1: 5})
    for _ in range(5):
        driver.step()
    tokens, host = driver.evict(1)
    third = driver.join(3, prompt(17, 3))
    assert set(third.blocks) & set(first.blocks)
    driver.step({3: 17})
    resumed = driver.join(4, tokens, saved=host)
    driver.step({4: len(tokens) - resumed.computed})
    for _ in range(6):
        driver.step()
    model = executor.model
    assert isinstance(model, TinyCausalLM)
    for live, known in ((resumed, 9), (second, 5), (third, 17)):
        check(model, live.tokens, known)
    assert len(resumed.tokens) == 9 + 6 + 7
    executor.close()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALISED])
def test_a_pipelined_core_yields_what_one_request_alone_yields(
    sampling: SamplingParams, kernels: Kernels
) -> None:
    """Two steps under way, more requests than slots, too few blocks for all of them."""

    def run(prompts: list[list[int]]) -> list[list[int]]:
        executor = make_executor(kernels, blocks=40)
        assert executor.shape.pipeline_depth == 2
        core = EngineCore(executor)
        requests = []
        for number, tokens in enumerate(prompts):
            params = replace(sampling, seed=len(tokens), max_tokens=20)
            request = build_request(
                number, tokens, params, shape=core.shape, eos_token_ids=(), draw_seed=lambda: 0, arrival=0.0
            )
            core.add(request)
            requests.append(request)
        while core.has_work:
            core.step()
        core.close()
        return [list(request.output_ids) for request in requests]

    prompts = [prompt(3 + 2 * i, seed=i) for i in range(10)]
    together = run(prompts)
    alone = [run([tokens])[0] for tokens in prompts]
    assert all(len(tokens) == 20 for tokens in together)
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    # Float32 logits on a GPU depend a little on the batch; a near tie may fall the other way.
    assert same >= 8


def test_the_sampler_draws_the_same_tokens_as_on_the_cpu(kernels: Kernels) -> None:
    kinds = [
        GREEDY,
        SamplingParams(),
        SAMPLED,
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=5),
        SamplingParams(min_p=0.05),
    ]
    count, vocab = 64, 32_007
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(0)) * 2
    logits[3, 17] = torch.nan
    logits[5] = -torch.inf
    table, there = (SamplingTable(count, vocab, every) for every in (False, kernels is Kernels.TRITON))
    for slot in range(count):
        table.set(slot, kinds[slot % len(kinds)], seed=slot * 7919)
        there.set(slot, kinds[slot % len(kinds)], seed=slot * 7919)
    slots, positions = np.arange(count), torch.arange(count) * 3
    expected, valid = sample(logits, table.rows(slots, torch.device("cpu")), positions)
    cuda = torch.device("cuda", 0)
    rows = there.rows(slots, cuda)
    tokens, valid_there = sample(logits.to(cuda), rows, positions.to(cuda), kernels)
    assert torch.equal(valid_there.cpu(), valid)
    # exp may differ in its last bit, which moves a draw with a probability of about 1e-7.
    assert int((tokens.cpu() != expected).sum()) <= 1


def test_logits_are_adjusted_as_on_the_cpu(kernels: Kernels) -> None:
    """Also told: the likeliest tokens, and how likely they were."""
    count, vocab, known = 8, 3001, 20
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(1)) * 2
    tokens = np.arange(count * known, dtype=np.int64).reshape(count, known) % 97
    slots, positions, last = np.arange(count), torch.full((count,), known), torch.arange(count)

    def adjusted(device: torch.device) -> tuple[torch.Tensor, list[TokenLogprobs]]:
        table, asked = AdjustmentTable(count, 64, device), LogprobTable(count, device)
        for slot in range(count):
            request = Request(slot, tokens[slot, :12].tolist(), PENALISED, 9, frozenset({5, 6}))
            table.set(slot, request, tokens[slot])
            asked.set(slot, slot % 4)
        rows, wanted = table.rows(slots, count), asked.rows(slots)
        assert rows is not None and wanted is not None
        there = logits.to(device, copy=True)
        used = kernels if device.type == "cuda" else None
        found = logprobs_of(there, last.to(device), wanted, used)
        if device.type == "cuda":
            found = found.to_host()
            torch.cuda.synchronize()
        rows.apply(there, positions.to(device), last.to(device), known, used)
        return there.cpu(), list(found.by_row().values())

    expected, told = adjusted(torch.device("cpu"))
    there, told_there = adjusted(torch.device("cuda", 0))
    torch.testing.assert_close(there, expected)
    assert [one.top_ids for one in told_there] == [one.top_ids for one in told]
    assert [one.logprob for one in told_there] == pytest.approx([one.logprob for one in told], abs=1e-5)


def test_blocks_travel_through_pinned_memory(kernels: Kernels) -> None:
    executor = make_executor(kernels)
    pool = executor.device_pool
    pool.storage.random_()
    before = pool.storage.clone()
    transfer = executor.transfer
    assert isinstance(transfer, KvTransfer)
    transfer.copy_out([BlockCopy(i, 31 - i) for i in range(16)])
    pool.storage.zero_()
    transfer.copy_in([BlockCopy(i + 16, 31 - i) for i in range(16)])
    torch.cuda.synchronize()
    assert torch.equal(pool.storage[16:32], before[:16])
    times = transfer.measure()
    assert times.out_s > 0
    assert times.in_s > 0


def test_an_engine_is_built_within_its_share_of_the_device(tmp_path: Path) -> None:
    from scripts.gpu_suite.random_llama import write_random_llama

    write_random_llama(tmp_path / "tiny", "tiny", torch.device("cuda"))
    free, total = torch.cuda.mem_get_info()
    share = (total - free + (3 << 30)) / total
    config = EngineConfig(
        str(tmp_path / "tiny"),
        device="cuda",
        swap_space=1 << 20,
        gpu_memory_utilization=share,
        max_num_seqs=8,
    )
    executor, spec = build_executor(config)
    assert spec.vocab_size == 512
    assert executor.model.precision.name == "bfloat16"
    assert total - torch.cuda.mem_get_info()[0] <= total * share
    executor.close()


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="has no 8-bit floats"
)
def test_kv_of_8_bits(tmp_path: Path) -> None:
    """Mixed steps and a trip to the host; each token is the best of the reference, or near it. Twice the
    blocks of bfloat16 come out of the same bytes."""
    from scripts.gpu_suite.random_llama import write_random_llama

    path = tmp_path / "tiny"
    write_random_llama(path, "tiny", torch.device("cuda"))
    write_scales(path, TIGHT_SCALES)
    config = EngineConfig(
        str(path),
        device="cuda",
        dtype="bfloat16",
        kv_cache_dtype="fp8",
        kv_cache_memory=1 << 20,
        swap_space=1 << 18,
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )
    wide, _ = build_executor(replace(config, kv_cache_dtype="auto"))
    blocks = wide.shape.num_device_blocks
    wide.close()
    executor, _ = build_executor(config)
    assert executor.shape.num_device_blocks == 2 * blocks
    found = trip_to_the_host(executor, prompt(37, 1), prompt(5, 2))
    executor.close()
    right = reference(path, BFLOAT16, TIGHT_SCALES)
    assert all(shortfall(right, tokens[:known], tokens[known:]) < 0.03 for tokens, known in found)
