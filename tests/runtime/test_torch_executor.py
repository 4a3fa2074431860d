"""The executor, driven by hand-written plans, against the same model with no cache."""

from __future__ import annotations

import random

import pytest
import torch
from plan_driver import PlanDriver
from tiny_causal_lm import VOCAB, TinyCausalLM

from chiron_engine.model.kv_pool import KvPool
from chiron_engine.policy.iteration.plan import BlockCopy, Joined, StepPlan
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import GREEDY, SamplingParams
from chiron_engine.runtime.torch_executor import TorchExecutor

BLOCK = 4
MODEL = TinyCausalLM()


def make_executor(blocks: int = 48, host_blocks: int = 24, slots: int = 6) -> TorchExecutor:
    layers = MODEL.spec.layers
    pool = KvPool(blocks, BLOCK, layers, torch.float32)
    pool.storage.view(torch.float32).fill_(torch.nan)  # whatever is read before it is written shows
    host = KvPool(host_blocks, BLOCK, layers, torch.float32) if host_blocks else None
    return TorchExecutor(MODEL, pool, host, max_slots=slots, max_step_tokens=64, max_model_len=128)


@pytest.fixture
def driver() -> PlanDriver:
    return PlanDriver(make_executor())


def prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCAB) for _ in range(length)]


def greedy(tokens: list[int], count: int) -> list[int]:
    """`count` more tokens by recomputing the whole sequence for each."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(MODEL.logits_of(tokens).argmax()))
    return tokens


def check(tokens: list[int], prompt_tokens: list[int]) -> None:
    assert tokens == greedy(prompt_tokens, len(tokens) - len(prompt_tokens))


def test_one_request_grows_over_blocks(driver: PlanDriver) -> None:
    live = driver.join(1, prompt(5, seed=1))
    driver.step({1: 5})
    for _ in range(14):
        driver.step()
    assert len(live.tokens) == 5 + 15
    assert len(live.blocks) == 5
    assert driver.rebuilt_batches == 1
    check(live.tokens, prompt(5, seed=1))


@pytest.mark.parametrize("sizes", [(1, 1, 9), (4, 7), (3, 4, 4), (11,)])
def test_chunked_prompts(driver: PlanDriver, sizes: tuple[int, ...]) -> None:
    live = driver.join(1, prompt(11, seed=2))
    for size in sizes:
        driver.step({1: size})
    driver.step()
    assert len(live.tokens) == 13
    check(live.tokens, prompt(11, seed=2))


def test_mixed_batch_of_decodes_and_chunks(driver: PlanDriver) -> None:
    first = driver.join(1, prompt(6, seed=3))
    driver.step({1: 6})
    second, third = driver.join(2, prompt(9, seed=4)), driver.join(3, prompt(3, seed=5))
    driver.step({2: 4, 3: 3})
    driver.step({2: 5})
    for _ in range(6):
        driver.step()
    check(first.tokens, prompt(6, seed=3))
    check(second.tokens, prompt(9, seed=4))
    check(third.tokens, prompt(3, seed=5))
    assert [len(live.tokens) for live in (first, second, third)] == [15, 16, 11]


def test_slot_and_blocks_are_reused_in_one_plan(driver: PlanDriver) -> None:
    driver.join(1, prompt(10, seed=6))
    kept = driver.join(2, prompt(4, seed=7))
    driver.step({1: 10, 2: 4})
    driver.step()
    left = driver.leave(1)
    driver.free_blocks = left.blocks + [b for b in driver.free_blocks if b not in left.blocks]
    driver.free_blocks.reverse()
    joined = driver.join(3, prompt(7, seed=8))
    assert joined.slot == left.slot
    assert set(joined.blocks) <= set(left.blocks)
    driver.step({3: 7})
    for _ in range(5):
        driver.step()
    check(kept.tokens, prompt(4, seed=7))
    check(joined.tokens, prompt(7, seed=8))


def test_preempted_to_host_and_resumed(driver: PlanDriver) -> None:
    victim, other = driver.join(1, prompt(9, seed=9)), driver.join(2, prompt(5, seed=10))
    driver.step({1: 9, 2: 5})
    for _ in range(4):
        driver.step()
    tokens, host = driver.evict(1)
    assert len(host) == 3
    # What was given back is taken and overwritten in the very step that saves it.
    intruder = driver.join(3, prompt(20, seed=11))
    assert set(intruder.blocks) & set(victim.blocks)
    driver.step({3: 20})
    driver.step()
    resumed = driver.join(4, tokens, saved=host)
    assert resumed.computed == 12
    driver.step({4: len(tokens) - 12})
    for _ in range(5):
        driver.step()
    check(resumed.tokens, prompt(9, seed=9))
    check(other.tokens, prompt(5, seed=10))
    check(intruder.tokens, prompt(20, seed=11))
    assert len(resumed.tokens) == 9 + 5 + 6


def test_host_block_saved_and_restored_in_one_plan() -> None:
    """Copies out come before copies in."""
    driver = PlanDriver(make_executor(host_blocks=2))
    driver.join(1, prompt(8, seed=12))
    driver.step({1: 8})
    tokens, host = driver.evict(1)
    resumed = driver.join(2, tokens, saved=host)
    driver.step({2: 1})
    driver.step()
    check(resumed.tokens, prompt(8, seed=12))


def test_a_plan_of_copies_alone() -> None:
    executor = make_executor()
    pool = executor.device_pool
    pool.storage[5].random_()
    saved = pool.storage[5].clone()
    plans = [
        StepPlan(0, copies_out=[BlockCopy(5, 9), BlockCopy(6, 10), BlockCopy(1, 3)]),
        StepPlan(1, copies_in=[BlockCopy(7, 9)]),
    ]
    for plan in plans:
        assert executor.collect(executor.submit(plan)).tokens == []
    assert torch.equal(pool.storage[7], saved)


@pytest.mark.parametrize("seed", range(4))
def test_random_plans(seed: int) -> None:
    """Joins, chunks, evictions and departures at random; every stream equals recomputation, and
    sampled streams draw the same numbers after they were resumed."""
    generator = random.Random(seed)
    driver = PlanDriver(make_executor(blocks=96))
    sampled = SamplingParams(temperature=1.3, top_k=30, top_p=0.95)
    prompts: dict[int, list[int]] = {}
    parked: list[tuple[int, list[int], list[int]]] = []
    finished: dict[int, list[int]] = {}
    names: dict[int, int] = {}
    for number in range(60):
        if driver.free_slots and generator.random() < 0.4:
            key = number
            if parked and generator.random() < 0.7:
                stream, tokens, host = parked.pop()
            else:
                stream, host = number, []
                tokens = prompt(generator.randrange(1, 18), seed=1000 * seed + number)
                prompts[stream] = list(tokens)
            driver.join(key, tokens, sampled if stream % 2 else GREEDY, seed=stream, saved=host)
            names[key] = stream
        ready = [k for k, live in driver.live.items() if live.computed >= live.known_at_join]
        if ready and generator.random() < 0.25:
            key = generator.choice(ready)
            if generator.random() < 0.6:
                parked.append((names[key], *driver.evict(key)))
            else:
                finished[names[key]] = driver.leave(key).tokens
        chunks = {
            key: generator.randint(1, min(5, live.known_at_join - live.computed))
            for key, live in driver.live.items()
            if live.computed < live.known_at_join
        }
        if driver.live:
            driver.step(chunks)
    finished |= {names[key]: live.tokens for key, live in driver.live.items()}
    finished |= {stream: tokens for stream, tokens, _ in parked}
    assert any(len(tokens) > len(prompts[stream]) + 3 for stream, tokens in finished.items() if stream % 2)
    for stream, tokens in finished.items():
        if stream % 2 == 0:
            check(tokens, prompts[stream])
        else:
            assert tokens == alone(prompts[stream], len(tokens), sampled, seed=stream)


def alone(tokens: list[int], length: int, sampling: SamplingParams, seed: int) -> list[int]:
    """The stream of a request that nobody disturbs."""
    driver = PlanDriver(make_executor())
    live = driver.join(0, list(tokens), sampling, seed=seed)
    while len(live.tokens) < length:
        driver.step({0: len(tokens)} if live.computed == 0 else {})
    return live.tokens[:length]


def test_steady_steps_keep_what_was_derived(driver: PlanDriver) -> None:
    driver.join(1, prompt(4, seed=20))
    driver.step({1: 4})
    driver.step()
    kept = driver.executor._packer._decodes
    lens = kept.lens
    driver.step()
    assert driver.executor._packer._decodes is kept
    assert kept.lens is lens
    assert kept.max_len == int(lens.max()) == 6


def test_rows_without_finite_logits_get_token_0_and_are_counted() -> None:
    class BrokenRows(TinyCausalLM):
        def forward(self, *args: object) -> torch.Tensor:
            logits = super().forward(*args)  # type: ignore[arg-type]
            logits[0] = torch.nan
            return logits

    executor = make_executor()
    executor.model = BrokenRows()
    driver = PlanDriver(executor)
    broken, healthy = driver.join(1, prompt(3, seed=1)), driver.join(2, prompt(4, seed=2))
    driver.step({1: 3, 2: 4})
    assert broken.tokens[-1] == 0
    check(healthy.tokens, prompt(4, seed=2))
    assert executor.num_invalid_rows == 1


def test_misuse_is_refused() -> None:
    executor = make_executor(host_blocks=0)
    with pytest.raises(ValueError, match="no host pool"):
        executor.submit(StepPlan(0, copies_out=[BlockCopy(0, 0)]))
    joined = Joined(0, Request(1, [1], GREEDY, 4), None, 0, [0])
    with pytest.raises(ValueError, match="without token values"):
        executor.submit(StepPlan(0, joined=[joined]))
    handle = executor.submit(StepPlan(1))
    with pytest.raises(RuntimeError, match="under way"):
        executor.submit(StepPlan(2))
    executor.collect(handle)
    with pytest.raises(ValueError, match="not the oldest"):
        executor.collect(handle)
    executor.close()
    executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        executor.submit(StepPlan(3))
