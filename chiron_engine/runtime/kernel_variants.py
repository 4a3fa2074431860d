"""Steps run before the first request so that Triton compiles nothing once requests wait.

Triton compiles a kernel anew for each set of constants, which takes far longer than a step. Most constants
follow from the model alone, and any step meets them. These depend on the step:

    rows of a tile of prefill attention         tokens of its chunks
    prefill attention in splits or not          the longest context
    blocks of logits that a program reads       whether more than FEW_ROWS rows are sampled, or scored
    greedy, drawn, drawn with top-k or top-p    what the requests ask for; so for each other parameter
    logits aligned to 16 bytes or not           how many rows are sampled before those of prompts

`tests/runtime/test_warm_up.py` counts what serving meets beyond these.
"""

from __future__ import annotations

from collections.abc import Iterator

from chiron_engine.policy.iteration.sampling_params import GREEDY, SamplingParams

from .torch_executor import TorchExecutor
from .trial_steps import TrialRequests

DRAWN = SamplingParams(temperature=1.0)
EVERYTHING = SamplingParams(
    temperature=1.0,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={0: 1.0},
    logprobs=1,
    prompt_logprobs=1,
)


def launch_all_variants(executor: TorchExecutor) -> None:
    """Run each kernel in each form that this executor's steps can ask for. Overwrites KV blocks: only before
    use, and only with Triton's kernels."""
    from chiron_kernels.gpu.logit_rows import FEW_ROWS
    from chiron_kernels.gpu.prefill_plan import LEAST_SHARED_KEYS
    from chiron_kernels.gpu.query_blocks import BLOCK_ROWS

    shape = executor.shape
    longest = min(shape.max_model_len, shape.num_device_blocks * shape.block_size) - 1
    _sample_in_every_way(executor, FEW_ROWS + 1, longest)
    for context in {0, LEAST_SHARED_KEYS}:
        for tokens in _doubling(min(max(BLOCK_ROWS), shape.max_step_tokens, longest)):
            known = max(context, tokens)
            if known <= longest:
                trial = TrialRequests(executor, 1, known, 1)
                trial.prefill(start=known - tokens)
                trial.leave()
    if executor.transfer is not None:
        executor.transfer.launch_kernel()


def _doubling(most: int) -> Iterator[int]:
    """1, 2, 4 and so on up to `most`: for every group of heads, one number of packed rows for each size of
    tile."""
    tokens = 1
    while tokens <= most:
        yield tokens
        tokens *= 2


def _sample_in_every_way(executor: TorchExecutor, many: int, longest: int) -> None:
    """many: rows that are more than a few. longest: tokens a request may know."""
    shape = executor.shape
    for sampling in (GREEDY, DRAWN):
        _sample(executor, sampling, 1)
    blocks_each = -(-2 // shape.block_size)
    _sample(executor, EVERYTHING, min(many, shape.max_slots, shape.num_device_blocks // blocks_each))
    if longest == 1:  # a prompt of one token has nothing to score
        return
    for rows in (1, many):
        _score(executor, min(rows, longest - 1))


def _sample(executor: TorchExecutor, sampling: SamplingParams, requests: int) -> None:
    """After a prompt of one token each, and once more."""
    trial = TrialRequests(executor, requests, 1, 1, sampling)
    trial.prefill()
    trial.decode()
    trial.leave()


def _score(executor: TorchExecutor, rows: int) -> None:
    """So many tokens of a prompt, in a step that samples nothing and in one that samples after them."""
    most = executor.shape.max_step_tokens
    alone, before = min(rows, most), min(rows, most - 1)
    trial = TrialRequests(executor, 1, rows + 1, 1, EVERYTHING)
    trial.prefill(end=alone, scored=alone)
    trial.prefill(start=rows - before, scored=before)
    trial.leave()
