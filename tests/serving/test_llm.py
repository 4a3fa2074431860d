"""The Python API over an executor without a model, and `LLM` over a tiny one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from chiron_engine import LLM, SamplingParams
from chiron_engine.config import EngineConfig
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.null_executor import NullExecutor, PlannedStep, scripted_token
from chiron_engine.core.requests import InvalidRequest, QueueFull
from chiron_engine.gateway.text import ModelText, TextError
from chiron_engine.policy.iteration.plan import StepResult
from chiron_engine.policy.iteration.request import Request
from chiron_engine.serving.core_setup import build_core
from chiron_engine.serving.offline import OfflineEngine
from chiron_engine.serving.outputs import RequestOutput
from tests.cli.tiny_llama import write_tiny_llama
from tests.gateway.tiny_model import END, write_tiny_model

SHAPE = ExecutorShape(
    block_size=4,
    num_device_blocks=64,
    num_host_blocks=16,
    max_slots=4,
    max_step_tokens=32,
    max_model_len=128,
    vocab_size=END + 1,
)


class CountingExecutor(NullExecutor):
    """A NullExecutor that can be slow and knows how often it was closed."""

    def __init__(self, step_s: float = 0.0) -> None:
        super().__init__(SHAPE)
        self.step_s = step_s
        self.closed = 0

    def collect(self, handle: PlannedStep) -> StepResult:
        time.sleep(self.step_s)
        return super().collect(handle)

    def close(self) -> None:
        self.closed += 1


def make_engine(directory: Path, executor: NullExecutor | None = None, **options: int) -> OfflineEngine:
    config = EngineConfig(model="tiny", **options)
    core = build_core(config, executor or CountingExecutor())
    resources = ExitStack()
    resources.callback(core.close)
    return OfflineEngine(core, config, ModelText.from_directory(directory), [END], resources)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("text"))


@pytest.fixture
def engine(directory: Path) -> Iterator[OfflineEngine]:
    with make_engine(directory) as engine:
        yield engine


def expected_tokens(prompt: str, seed: int, count: int) -> list[int]:
    request = Request(0, prompt.encode(), SamplingParams(), count, seed=seed)
    return [scripted_token(request, index, SHAPE.vocab_size) for index in range(count)]


def params(max_tokens: int, seed: int = 3) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True)


def test_outputs_come_in_the_order_of_the_prompts(engine: OfflineEngine) -> None:
    prompts = [chr(ord("a") + i % 26) * (1 + i % 7) for i in range(40)]
    counts = [1 + 7 * i % 20 for i in range(40)]
    outputs = engine.generate(prompts, [params(count) for count in counts])
    for prompt, count, output in zip(prompts, counts, outputs, strict=True):
        assert output.prompt_token_ids == list(prompt.encode())
        assert output.token_ids == expected_tokens(prompt, 3, count)
        assert output.text == engine.text.decode(output.token_ids)
        assert output.finish_reason == "length"


def test_a_queue_bound_below_the_number_of_prompts_only_delays(directory: Path) -> None:
    with make_engine(directory, max_queued_requests=2, max_queued_tokens=24) as engine:
        outputs = engine.generate(["x" * 20] * 17, params(3))
    assert [len(output.token_ids) for output in outputs] == [3] * 17


def test_one_prompt_may_be_a_string_or_ids(engine: OfflineEngine) -> None:
    (from_text,) = engine.generate("abc", params(4))
    (from_ids,) = engine.generate([97, 98, 99], params(4))
    (from_list,) = engine.generate([[97, 98, 99]], params(4))
    assert from_text.token_ids == from_ids.token_ids == from_list.token_ids
    assert engine.generate([]) == []


def test_chat_renders_the_template(engine: OfflineEngine) -> None:
    hello = [{"role": "user", "content": "hello"}]
    (one,) = engine.chat(hello, params(2))
    assert bytes(one.prompt_token_ids) == b"user: hello\nassistant: "
    assert len(engine.chat([hello, hello], params(2))) == 2
    with pytest.raises(TextError, match="roles are"):
        engine.chat([{"role": "robot", "content": "hello"}], params(2))


def test_a_stop_string_ends_the_output_and_frees_the_request(engine: OfflineEngine) -> None:
    (whole,) = engine.generate("abc", params(40))
    stop = whole.text[5:8]
    cut, other = engine.generate(["abc", "abd"], params(40), stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < 40
    assert other.token_ids == engine.generate("abd", params(40), stop=[stop])[0].token_ids
    with pytest.raises(ValueError, match="stop string is empty"):
        engine.generate("abc", params(4), stop=[""])


def test_an_end_token_stops_and_is_not_text(engine: OfflineEngine) -> None:
    tokens = expected_tokens("abc", 3, 10)
    (output,) = engine.generate("abc", SamplingParams(max_tokens=10, seed=3, stop_token_ids=(tokens[4],)))
    assert output.token_ids == tokens[:5]
    assert output.finish_reason == "stop"


def test_timing_adds_up(directory: Path) -> None:
    with make_engine(directory, CountingExecutor(step_s=0.002)) as engine:
        outputs = engine.generate(["abcd"] * 12, params(8))
    for output in outputs:
        timing = output.timing
        assert 0 <= timing.queue_ms <= timing.ttft_ms <= timing.total_ms
        assert 2.0 <= timing.mean_itl_ms <= timing.max_itl_ms
        assert timing.ttft_ms + 7 * timing.mean_itl_ms == pytest.approx(timing.total_ms, abs=50)
    # Four run at a time: the last ones wait for two rounds of eight steps.
    assert outputs[-1].timing.queue_ms > outputs[0].timing.queue_ms + 20


BAD = [
    ("", params(1), "empty"),
    ("x" * 200, params(1), "context"),
    ([END + 1], params(1), "outside the vocabulary"),
    ([-1], params(1), "whole number"),
    ("abc", params(1000), "exceed"),
    ("abc", SamplingParams(stop_token_ids=(9999,)), "stop token id 9999"),
    ("\ud800", params(1), "surrogate"),
]


@pytest.mark.parametrize(("prompt", "sampling", "words"), BAD, ids=[words for _, _, words in BAD])
def test_bad_input_is_refused_before_anything_runs(
    engine: OfflineEngine, prompt: str | list[int], sampling: SamplingParams, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        engine.generate(["fine", prompt], [params(2), sampling])
    assert len(engine.generate("fine", params(2))[0].token_ids) == 2


def test_sampling_params_must_match_the_prompts(engine: OfflineEngine) -> None:
    with pytest.raises(ValueError, match="2 sampling_params for 3 prompts"):
        engine.generate(["a", "b", "c"], [params(1)] * 2)


def test_unseeded_requests_repeat_with_the_engines_seed(directory: Path) -> None:
    def run(seed: int) -> list[list[int]]:
        with make_engine(directory, seed=seed) as engine:
            outputs = engine.generate(["abc", "abc"], SamplingParams(max_tokens=6, ignore_eos=True))
            return [output.token_ids for output in outputs]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1)[0] != run(1)[1]


def test_an_interrupted_call_leaves_the_engine_usable(directory: Path) -> None:
    class Interrupting(CountingExecutor):
        steps = 0

        def collect(self, handle: PlannedStep) -> StepResult:
            self.steps += 1
            if self.steps == 3:
                super().collect(handle)
                raise KeyboardInterrupt
            return super().collect(handle)

    with make_engine(directory, Interrupting()) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.generate(["abc"] * 6, params(20))
        (output,) = engine.generate("abd", params(5))
        assert output.token_ids == expected_tokens("abd", 3, 5)


async def collect(
    engine: OfflineEngine, prompt: str, sampling: SamplingParams, **more: list[str]
) -> RequestOutput:
    text, token_ids, output = "", [], None
    async for chunk in engine.stream(prompt, sampling, **more):
        assert output is None
        text, output = text + chunk.text, chunk.output
        token_ids += chunk.token_ids
    assert output is not None
    assert (output.text, output.token_ids) == (text, token_ids)
    return output


def test_streams_share_the_engine_and_equal_generate(directory: Path) -> None:
    async def scenario(engine: OfflineEngine) -> list[RequestOutput]:
        prompts = [f"prompt {i}" for i in range(20)]
        return list(await asyncio.gather(*(collect(engine, p, params(12), stop=["zz"]) for p in prompts)))

    with make_engine(directory) as engine:
        streamed = asyncio.run(scenario(engine))
        again = asyncio.run(scenario(engine))  # another event loop, the same engine
        batched = engine.generate([f"prompt {i}" for i in range(20)], params(12), stop=["zz"])
    for one, two, three in zip(streamed, again, batched, strict=True):
        assert one.token_ids == two.token_ids == three.token_ids
        assert one.text == two.text == three.text
        assert one.finish_reason == three.finish_reason == "length"


def test_a_stream_that_is_left_is_aborted(directory: Path) -> None:
    async def scenario(engine: OfflineEngine) -> None:
        stream = engine.stream("abc", params(100))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(collect(engine, "abd", params(100)), 0.05)

    executor = CountingExecutor(step_s=0.002)
    with make_engine(directory, executor) as engine:
        asyncio.run(scenario(engine))
        end = time.monotonic() + 5
        while engine._core.load().running and time.monotonic() < end:
            time.sleep(0.01)
        load = engine._core.load()
        assert (load.running, load.waiting) == (0, 0)
        assert load.free_blocks == load.total_blocks


def test_a_stream_stops_at_a_stop_string(directory: Path) -> None:
    with make_engine(directory) as engine:
        (whole,) = engine.generate("abc", params(40))
        stop = whole.text[5:8]
        output = asyncio.run(collect(engine, "abc", params(40), stop=[stop]))
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.finish_reason == "stop"


def test_a_full_queue_refuses_a_stream(directory: Path) -> None:
    async def scenario(engine: OfflineEngine) -> list[BaseException | RequestOutput]:
        streams = [collect(engine, "abc", params(20)) for _ in range(30)]
        return list(await asyncio.gather(*streams, return_exceptions=True))

    with make_engine(directory, CountingExecutor(step_s=0.002), max_queued_requests=3) as engine:
        results = asyncio.run(scenario(engine))
    refused = [result for result in results if isinstance(result, QueueFull)]
    assert refused
    assert all(isinstance(result, RequestOutput | QueueFull) for result in results)


def test_a_bad_stream_raises_at_once(engine: OfflineEngine) -> None:
    with pytest.raises(InvalidRequest, match="context"):
        asyncio.run(collect(engine, "x" * 200, params(1)))


def test_several_threads_may_generate(engine: OfflineEngine) -> None:
    with ThreadPoolExecutor(4) as threads:
        results = [threads.submit(engine.generate, [f"thread {n}"] * 5, params(10)) for n in range(4)]
    for number, result in enumerate(results):
        assert {tuple(o.token_ids) for o in result.result()} == {
            tuple(expected_tokens(f"thread {number}", 3, 10))
        }


@pytest.mark.parametrize("streams", [False, True])
def test_closing_releases_the_executor(directory: Path, streams: bool) -> None:
    executor = CountingExecutor()
    engine = make_engine(directory, executor)
    if streams:
        asyncio.run(collect(engine, "abc", params(2)))
    engine.close()
    engine.close()
    assert executor.closed >= 1
    with pytest.raises(RuntimeError):
        engine.generate("abc", params(1))


def test_llm_loads_a_model_and_logs_steps(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny")
    log = tmp_path / "steps.jsonl"
    phases: list[str] = []
    small = {"kv_cache_memory": 1 << 24, "swap_space": 1 << 20, "max_num_seqs": 4, "threads": 1}
    with LLM(
        str(model),
        dtype="float32",
        step_log=str(log),
        progress=lambda phase, _: phases.append(phase),
        **small,
    ) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        alone = llm.generate("hello", greedy)[0].token_ids
        together = llm.generate(["other", "hello", "third"], greedy)
        assert together[1].token_ids == alone
    assert "load weights" in phases
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(step["finished"] for step in steps) == 4


def test_llm_refuses_unknown_and_bad_options() -> None:
    with pytest.raises(TypeError, match="max_seqs"):
        LLM("smollm2", max_seqs=4)
    with pytest.raises(ValueError, match="dtype is 'int3'"):
        LLM("smollm2", dtype="int3")


@pytest.mark.parametrize("name", ["kv_cache_memory", "swap_space", "max_num_seqs", "seed"])
@pytest.mark.parametrize("value", ["256MiB", 2.0, True])
def test_what_is_no_whole_number_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be a whole number"):
        LLM("smollm2", **{name: value})


def test_whole_numbers_of_numpy_are_taken() -> None:
    config = EngineConfig("m", max_num_seqs=np.int32(4), seed=np.uint64(7))
    assert (config.max_num_seqs, config.seed) == (4, 7)
    assert type(config.max_num_seqs) is type(config.seed) is int
