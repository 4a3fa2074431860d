"""Greedy tokens of the whole engine against transformers' eager model, in float32.

Whatever the scheduler does to a request (chunks, batch-mates, eviction to the host or for
recomputation, prefix hits, resizes, aborts beside it) must leave its tokens alone: each is the one that
eager chooses after those before it, so that all of them are what eager would have generated. Sums in
float32 depend on the number of rows, so a token may be another one where eager's logit of it lies within
1e-3 of the best; such positions are counted.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.loader import CausalLM, load_model
from chiron_engine.model.precision import FLOAT32
from chiron_engine.model.source import resolve_model
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.request import FinishReason, Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import GREEDY
from chiron_engine.runtime.torch_executor import TorchExecutor

OUTPUT_TOKENS = 24
NEAR_TIE = 1e-3
SLOTS = 32
STEP_TOKENS = 256
DEVICE_BLOCKS = 150
SAVE = SwapCosts(0.0, 0.0, 1.0)
RECOMPUTE = SwapCosts(1.0, 1.0, 0.0)
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"


class Eager:
    """What transformers' eager model makes of outputs: one pass for each that no pass has seen."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self._known: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}

    def shortfalls(self, prompt: list[int], output: list[int]) -> list[float]:
        """By how much the logit of each output token is below the best; 0 where eager chooses it."""
        known, found = self._known.get(tuple(prompt), ([], []))
        if known[: len(output)] != output:
            found = self._compute(prompt, output)
            self._known[tuple(prompt)] = (output, found)
        return found[: len(output)]

    def _compute(self, prompt: list[int], output: list[int]) -> list[float]:
        with torch.inference_mode():
            logits = self._model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits[torch.arange(len(output)), torch.tensor(output)]
        return [float(below) for below in logits.max(dim=-1).values - chosen]


@pytest.fixture(scope="module")
def model_path() -> Path:
    return resolve_model("smollm2")


@pytest.fixture(scope="module")
def eager(model_path: Path) -> Eager:
    return Eager(model_path)


@pytest.fixture(scope="module")
def prompts(model_path: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    assert len(texts) == 64
    return [tokenizer.encode(CHAT.format(text)).ids for text in texts]


@pytest.fixture(scope="module")
def model(model_path: Path) -> CausalLM:
    return load_model(model_path, precision=FLOAT32, device=torch.device("cpu"))


def make_core(model: CausalLM, seed: int) -> EngineCore:
    """A pool far too small for 32 requests; odd seeds save evicted KV, even ones recompute it."""
    pools = [
        KvPool(count, 16, model.spec.layers, torch.float32, torch.device("cpu"))
        for count in (DEVICE_BLOCKS, 100)
    ]
    executor = TorchExecutor(model, *pools, max_slots=SLOTS, max_step_tokens=STEP_TOKENS, max_model_len=2048)
    core = EngineCore(
        executor,
        clock=VirtualClock(),
        limits=Limits(SLOTS, STEP_TOKENS),
        swap_costs=SAVE if seed % 2 else RECOMPUTE,
    )
    for _ in range(20):  # outputs predicted far too short: blocks run out and requests are evicted
        core.scheduler.output_lengths.observe(1)
    return core


def make_request(model: CausalLM, number: int, prompt: list[int], rng: random.Random) -> Request:
    return Request(
        request_id=number,
        prompt_ids=prompt,
        sampling=GREEDY,
        max_tokens=OUTPUT_TOKENS,
        stop_ids=frozenset(model.spec.eos_token_ids),
        slo=Slo(rng.choice([SloClass.BATCH, SloClass.BATCH, SloClass.INTERACTIVE])),
        arrival=float(number),
    )


def run_under_stress(core: EngineCore, requests: list[Request], doomed: set[int], seed: int) -> None:
    """Arrivals in bursts, a resize every few steps (from 32 to 1 and back among them), aborts."""
    rng = random.Random(seed)
    waiting = list(requests)
    for step in range(20_000):
        if not (waiting or core.has_work):
            return
        if waiting and rng.random() < 0.3:
            for _ in range(rng.randint(1, 16)):
                if waiting:
                    core.add(waiting.pop())
        if step % 40 == 20:
            core.set_limits(1, rng.randint(1, STEP_TOKENS), "preempt")
        elif step % 40 == 25 or rng.random() < 0.1:
            running = rng.choice([4, 16, SLOTS, SLOTS])
            core.set_limits(running, rng.randint(running, STEP_TOKENS), rng.choice(["drain", "preempt"]))
        output = core.step()
        for request in output.requests:
            if request.request_id in doomed and len(request.output_ids) >= request.request_id % 5:
                core.abort(request.request_id)
    raise AssertionError("requests never finish")


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_each_token_is_the_one_eager_chooses(
    model: CausalLM, eager: Eager, prompts: list[list[int]], seed: int
) -> None:
    rng = random.Random(seed)
    core = make_core(model, seed)
    # Eight prompts come twice (prefix hits), eight more requests are aborted on the way.
    chosen = [*prompts, *rng.sample(prompts, 16)]
    requests = [make_request(model, n, prompt, rng) for n, prompt in enumerate(chosen)]
    doomed = set(range(72, 80))
    order = requests[:]
    rng.shuffle(order)
    run_under_stress(core, order, doomed, seed)

    load = core.load()
    assert load.preemptions > 10 and load.prefix_hit_tokens > 0
    assert (load.free_blocks, load.free_host_blocks) == (load.total_blocks, load.total_host_blocks)
    assert sum(r.finish_reason is FinishReason.ABORT for r in requests) >= 4
    compared = differing = 0
    for request, prompt in zip(requests, chosen, strict=True):
        output = list(request.output_ids)
        check_end(request, request.request_id in doomed)
        below = eager.shortfalls(prompt, output) if output else []
        assert max(below, default=0.0) < NEAR_TIE, (request.request_id, below)
        compared += len(output)
        differing += sum(each > 0.0 for each in below)
    assert compared > 64 * OUTPUT_TOKENS * 0.9
    assert differing <= 0.01 * compared, f"{differing} near ties in {compared} positions"
    print(f"seed {seed}: {compared} tokens, {differing} near ties, {load.preemptions} preemptions")


def check_end(request: Request, is_doomed: bool) -> None:
    """At its length or at the first token that stops it, and nowhere else unless it was aborted."""
    output = list(request.output_ids)
    assert not request.stop_ids.intersection(output[:-1])
    if request.finish_reason is FinishReason.ABORT:
        assert is_doomed
    elif request.finish_reason is FinishReason.STOP:
        assert output[-1] in request.stop_ids
    else:
        assert request.finish_reason is FinishReason.LENGTH and len(output) == OUTPUT_TOKENS
        assert output[-1] not in request.stop_ids
