"""Decode steps replayed, on Triton's kernels interpreted. In place of a CUDA graph the recorded work is run
again over the same memory: what padding, buffers and the choice of a size come to is the same."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from chiron_kernels.gpu.launch import Launch
from torch.utils._python_dispatch import TorchDispatchMode

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.requests import build_request
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.policy.iteration.sampling_params import GREEDY, SamplingParams
from chiron_engine.runtime.build import build_executor
from chiron_engine.runtime.decode_graphs import LARGEST, DecodeGraphs, Work, capture_sizes
from chiron_engine.runtime.graph_capture import GraphCapture, graph_capture_for
from chiron_engine.runtime.shared_prefixes import CascadeRule, PrefixFinder
from chiron_engine.runtime.torch_executor import TorchExecutor
from chiron_engine.runtime.trial_steps import TrialRequests
from tests.cli.tiny_llama import write_tiny_llama
from tests.triton_interpreter import install

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu replays graphs on the GPU")

BLOCK = 16
PENALISED = SamplingParams(temperature=0.0, repetition_penalty=1.2, logit_bias={5: 1.5}, logprobs=2)
SAMPLED = SamplingParams(temperature=1.1, top_k=20, top_p=0.9, seed=3)


def run_again(work: Work) -> Work:
    work()
    return work


def do_nothing(work: Work) -> Work:
    return lambda: None


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    install()
    model = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    return EngineConfig(
        str(model),
        device="cpu",
        dtype="float32",
        kernels="triton",
        block_size=BLOCK,
        max_num_seqs=6,
        max_num_batched_tokens=64,
        max_model_len=512,  # eight tiles: long requests are split
        kv_cache_memory=1 << 19,
        swap_space=0,
        threads=1,
    )


@pytest.fixture(scope="module")
def built(config: EngineConfig) -> Iterator[TorchExecutor]:
    executor, _ = build_executor(config)
    yield executor
    executor.close()


@pytest.fixture
def executor(built: TorchExecutor) -> Iterator[TorchExecutor]:
    """Without graphs, and with an empty pool."""
    yield built
    built.decode_graphs = None
    built.device_pool.storage.zero_()


@pytest.fixture
def graphs(executor: TorchExecutor) -> DecodeGraphs:
    GraphCapture(lambda: run_again).apply(executor)
    assert executor.decode_graphs is not None
    return executor.decode_graphs


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (32, [1, 2, 4, 8, 16, 24, 32]),
    ],
)
def test_sizes(max_num_seqs: int, sizes: list[int]) -> None:
    assert capture_sizes(max_num_seqs) == sizes


def test_sizes_end_at_the_largest() -> None:
    sizes = capture_sizes(4096)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == LARGEST
    assert capture_sizes(300)[-3:] == [272, 288, 300]


def generate(executor: TorchExecutor) -> tuple[list[list[int]], list[tuple[bool, bool]]]:
    """The tokens of requests that join and leave one after another; of each step, whether it only decoded and
    whether it was replayed."""
    core = EngineCore(executor, enable_prefix_caching=False)
    steps: list[tuple[bool, bool]] = []
    core.add_step_hook(
        lambda stats: steps.append((bool(stats.decode_requests and not stats.prefill_tokens), stats.graph))
    )
    requests = []
    for number, sampling in enumerate([GREEDY, SAMPLED, PENALISED] * 2):
        prompt = [(7 * number + 3 * place) % 250 for place in range(3 + 6 * number)]
        params = replace(sampling, max_tokens=2 + number, ignore_eos=True)
        request = build_request(
            number, prompt, params, shape=core.shape, eos_token_ids=(), draw_seed=lambda: 5, arrival=0.0
        )
        core.add(request)
        requests.append(request)
    while core.has_work:
        core.step()
    return [list(request.output_ids) for request in requests], steps


def test_tokens_are_those_of_launches_one_by_one(executor: TorchExecutor) -> None:
    expected, steps = generate(executor)
    assert not any(graph for _, graph in steps)
    GraphCapture(lambda: run_again).apply(executor)
    tokens, steps = generate(executor)
    assert tokens == expected
    # Those that only decode are replayed, and no others.
    assert all(only_decoded == graph for only_decoded, graph in steps)
    assert {graph for _, graph in steps} == {False, True}


def occupied(executor: TorchExecutor, count: int, known: int) -> TrialRequests:
    trial = TrialRequests(executor, count, known, 1)
    trial.prefill()
    return trial


@pytest.mark.parametrize("count", [1, 3, 5, 6])
@torch.inference_mode()
def test_padding_writes_nothing_and_changes_no_row(
    executor: TorchExecutor, graphs: DecodeGraphs, count: int
) -> None:
    """What no row of the step may read is NaN, and all slots had longer requests before."""
    trial = occupied(executor, 6, 9)
    slots, lens = torch.arange(count).flip(0), torch.arange(count) % 8 + 1
    kv = [executor.device_pool.kv(layer) for layer in range(2)]
    expected = graphs.eager_logits(slots, lens)
    graphs.logits(torch.arange(6), torch.full((6,), 9))
    for layer in kv:
        for slot in range(6):
            length = int(lens[slots == slot]) if slot < count else 0
            layer[slot, length:] = torch.nan
        layer[6:] = torch.nan
    before = executor.device_pool.storage.clone()
    torch.testing.assert_close(graphs.logits(slots, lens), expected)
    now = executor.device_pool.storage
    changed = (before != now).view(executor.device_pool.num_blocks, -1).any(dim=1).nonzero().flatten()
    assert set(changed.tolist()) <= set(slots.tolist())
    for layer in kv:
        for slot in range(6):
            length = int(lens[slots == slot]) if slot < count else 0
            assert bool(layer[slot, length:].isnan().all())
    trial.leave()


class Operations(TorchDispatchMode):
    """Every operation of torch and every launch, with all that the host gives them: names, shapes, strides,
    numbers, grids, and where their tensors are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.done: list[Any] = []
        self.held: list[torch.Tensor] = []
        self.launches = 0
        monkeypatch.setattr(Launch, "run", lambda launch: self.launch(launch))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.done.append((str(func), self._told(args), self._told(kwargs or {}), self._told(result)))
        return result

    def launch(self, launch: Launch) -> None:
        self.launches += 1
        told = {name: self._told(value) for name, value in launch.arguments.items()}
        self.done.append((launch.kernel, launch.grid, told, launch._options()))

    def _told(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            # Held, so that no two that do not share memory are ever at the same address.
            self.held.append(value)
            if value.is_mkldnn:  # a weight, which has no address that it tells
                return id(value), value.shape, None, value.dtype
            return value.data_ptr(), value.shape, value.stride(), value.dtype
        if isinstance(value, dict):
            return {name: self._told(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._told(each) for each in value]
        if hasattr(value, "block_shape"):  # a descriptor
            return self._told(value.base), value.shape, value.strides, value.block_shape
        return value


def differing_addresses(first: Any, second: Any) -> bool:
    """Whether the two are the same but for addresses, some of which differ."""
    if isinstance(first, tuple) and len(first) == 4 and isinstance(first[1], torch.Size):
        assert first[1:] == second[1:]
        return bool(first[0] != second[0])
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return any([differing_addresses(first[name], second[name]) for name in first])
    if isinstance(first, list | tuple):
        assert len(first) == len(second)
        return any([differing_addresses(a, b) for a, b in zip(first, second, strict=True)])
    assert first == second
    return False


STATIC = {
    "_slot_mapping": {"row_of", "tables"},
    "_add_rms_norm": {"weight"},
    "_rope_kv_write": {"kv"},
    "_decode_splits": {"lens"},
    "_decode_attention": {"kv", "tables", "table_rows", "lens", "sinks"},
    "_merge_splits": set(),
    "_gated_activation": set(),
}
"""Arguments of the kernels of a pass that are where they are for as long as the engine lives."""


@torch.inference_mode()
def test_steps_of_a_size_differ_in_nothing_the_host_gives(
    executor: TorchExecutor, graphs: DecodeGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes over other requests of other lengths, through all of `logits` but its copies: what a graph
    holds of the first serves the second."""
    trial = occupied(executor, 6, 9)
    recorded = []
    for slots, lens in (([0, 1, 2], [1, 2, 3]), ([5, 3, 4], [500, 300, 17])):
        graphs.logits(torch.tensor(slots), torch.tensor(lens))
        with monkeypatch.context() as patched, Operations(patched) as operations:
            graphs._replays[4]()
        recorded.append(operations)
        # Requests come and go in between, and their tables grow.
        trial.leave()
        trial = occupied(executor, 6, 20)
    trial.leave()
    first, second = recorded
    assert first.launches == second.launches > 10
    differing_addresses(first.done, second.done)
    seen = set()
    for one, other in zip(first.done, second.done, strict=True):
        if isinstance(one[0], str):
            # Neither reads a number back nor uploads one.
            assert "_local_scalar_dense" not in one[0] and "pin" not in one[0] and "nonzero" not in one[0]
            continue
        name = one[0].fn.__name__
        seen.add(name)
        for argument in STATIC[name]:
            assert one[2][argument] == other[2][argument], (name, argument)
    assert seen == set(STATIC)


@torch.inference_mode()
def test_the_places_that_graphs_read_do_not_move(executor: TorchExecutor) -> None:
    states = executor._states
    before = states.last_tokens.data_ptr(), states.device_tables.data_ptr()
    for _ in range(2):
        trial = occupied(executor, 6, 9)
        trial.decode()
        trial.leave()
    assert (states.last_tokens.data_ptr(), states.device_tables.data_ptr()) == before


def test_where_capturing_fails_steps_are_launched_one_by_one(
    executor: TorchExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def refuse(work: Work) -> Work:
        tried.append(work)
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    capture = GraphCapture(lambda: refuse)
    with caplog.at_level(logging.ERROR):
        capture.apply(executor)
        capture.apply(executor)
    (record,) = caplog.records
    assert "operation not permitted when stream is capturing" in record.getMessage()
    assert len(tried) == 1 and not capture
    assert executor.decode_graphs is None
    trial = occupied(executor, 1, 3)
    assert trial.decode() > 0
    trial.leave()


def test_graphs_that_give_other_logits_are_not_used(
    executor: TorchExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        GraphCapture(lambda: do_nothing).apply(executor)
    (record,) = caplog.records
    assert "differ by up to" in record.getMessage()
    assert executor.decode_graphs is None


def test_graphs_that_failed_leave_their_memory(
    executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make() -> DecodeGraphs:
        graphs = DecodeGraphs(executor.model, executor.device_pool, executor._packer, 2)
        made.append(weakref.ref(graphs))
        return graphs

    monkeypatch.setattr(executor, "make_decode_graphs", make)
    gc.disable()
    try:
        GraphCapture(lambda: do_nothing).apply(executor)
    finally:
        gc.enable()
    (graphs,) = made
    assert graphs() is None


def test_graphs_are_tried_out_in_pools_too_small_for_their_largest(config: EngineConfig) -> None:
    block = 2 * 2 * 2 * 16 * 4 * BLOCK
    small, _ = build_executor(replace(config, kv_cache_memory=2 * block, max_model_len=None))
    GraphCapture(lambda: run_again).apply(small)
    assert small.decode_graphs is not None and small.shape.num_device_blocks == 2
    small.close()


def test_who_is_captured(config: EngineConfig, executor: TorchExecutor) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    model = executor.model
    assert model.capturable
    assert graph_capture_for(config, model, cuda)
    assert not graph_capture_for(config, model, cpu)
    assert not graph_capture_for(replace(config, enforce_eager=True), model, cuda)
    torch_model = build_executor(replace(config, kernels=Kernels.TORCH.value))[0].model
    assert not torch_model.capturable
    assert not graph_capture_for(config, torch_model, cuda)


def test_steps_with_shared_prefixes_are_launched_one_by_one(
    executor: TorchExecutor, graphs: DecodeGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed: list[int] = []

    def replay(slots: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        replayed.append(len(slots))
        return graphs.eager_logits(slots, lens)

    monkeypatch.setattr(graphs, "logits", replay)
    finder, executor.prefixes = executor.prefixes, PrefixFinder(CascadeRule(BLOCK), BLOCK)
    for sharers, expected in ((2, []), (0, [3])):
        trial = TrialRequests(executor, 3, BLOCK + 1, 1, sharers=sharers, shared=1)
        trial.prefill(start=BLOCK)
        trial.decode()
        trial.leave()
        assert replayed == expected
    executor.prefixes = finder
