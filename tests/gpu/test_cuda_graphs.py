"""Decode steps replayed from CUDA graphs: the tokens of launches one by one, within the memory set aside."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.requests import build_request
from chiron_engine.policy.iteration.sampling_params import GREEDY, SamplingParams
from chiron_engine.runtime import graph_capture
from chiron_engine.runtime.build import build_executor
from chiron_engine.runtime.decode_graphs import Work, capture_sizes
from chiron_engine.runtime.torch_executor import TorchExecutor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SAMPLED = SamplingParams(temperature=1.2, top_k=40, top_p=0.95)
REQUESTS = 24


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    from scripts.gpu_suite.random_llama import write_random_llama

    path = tmp_path_factory.mktemp("models") / "tiny"
    write_random_llama(path, "tiny", torch.device("cuda"))
    return EngineConfig(
        str(path),
        device="cuda",
        dtype="float32",
        kernels="triton",
        max_num_seqs=12,
        max_num_batched_tokens=128,
        kv_cache_memory=64 << 20,
        swap_space=1 << 20,
    )


def generate(executor: TorchExecutor) -> tuple[list[list[int]], list[tuple[bool, bool]]]:
    """The tokens of requests that come and go; of each step, whether it only decoded and whether it was
    replayed."""
    core = EngineCore(executor)
    steps: list[tuple[bool, bool]] = []
    core.add_step_hook(
        lambda stats: steps.append((bool(stats.decode_requests and not stats.prefill_tokens), stats.graph))
    )
    requests = []
    for number in range(REQUESTS):
        prompt = [(7 * number + 3 * place) % 500 for place in range(3 + 11 * number % 90)]
        params = replace(SAMPLED if number % 2 else GREEDY, seed=number, max_tokens=8 + 3 * number)
        request = build_request(
            number, prompt, params, shape=core.shape, eos_token_ids=(), draw_seed=lambda: 0, arrival=0.0
        )
        core.add(request)
        requests.append(request)
    while core.has_work:
        core.step()
    core.close()
    return [list(request.output_ids) for request in requests], steps


def test_tokens_are_those_of_launches_one_by_one(
    config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        replaying, _ = build_executor(config)
    assert not caplog.records
    assert replaying.decode_graphs is not None
    assert replaying.decode_graphs.sizes == capture_sizes(12)
    tokens, steps = generate(replaying)
    assert all(only_decoded == graph for only_decoded, graph in steps)
    assert {graph for _, graph in steps} == {False, True}
    eager, _ = build_executor(replace(config, enforce_eager=True))
    assert eager.decode_graphs is None
    expected, steps = generate(eager)
    assert not any(graph for _, graph in steps)
    # Logits depend a little on the size of a batch, which padding changes; a near tie may fall the other way.
    same = sum(a == b for a, b in zip(tokens, expected, strict=True))
    assert same >= REQUESTS - 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_captured(config: EngineConfig, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        executor, _ = build_executor(replace(config, dtype=dtype))
    assert not caplog.records
    assert executor.decode_graphs is not None
    executor.close()


def test_capturing_stays_within_the_share_of_the_device(config: EngineConfig) -> None:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = (total - free + (3 << 30)) / total
    filling = replace(config, kv_cache_memory=None, gpu_memory_utilization=share, max_num_seqs=64)
    executor, _ = build_executor(filling)
    assert executor.decode_graphs is not None
    assert total - torch.cuda.mem_get_info()[0] <= total * share
    executor.close()


def test_memory_comes_back_with_the_executor(config: EngineConfig) -> None:
    build_executor(config)[0].close()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        build_executor(config)[0].close()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 16 << 20


def test_a_capture_that_waits_for_the_device_leaves_the_engine_eager(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also: steps afterwards run on the stream they ran on before."""

    class Waiting(graph_capture.CudaCapture):
        def __call__(self, work: Work) -> Work:
            def and_read_back() -> None:
                work()
                torch.ones(1, device="cuda").item()

            return super().__call__(and_read_back)

    monkeypatch.setattr(graph_capture, "CudaCapture", Waiting)
    stream = torch.cuda.current_stream()
    with caplog.at_level(logging.ERROR):
        executor, _ = build_executor(config)
    assert len(caplog.records) == 1
    assert executor.decode_graphs is None
    assert torch.cuda.current_stream() == stream
    tokens, _ = generate(executor)
    assert len(tokens) == REQUESTS and all(tokens)
