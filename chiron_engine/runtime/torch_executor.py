"""The executor that runs a real model: plans in, token ids out."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chiron_engine.core.executor import ExecutorShape
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.policy.iteration.plan import StepPlan, StepResult

from .decode_graphs import DecodeGraphs
from .kv_transfer import CopyBlocks, KvTransfer
from .prompt_scores import PromptScores
from .sampler import sample
from .shared_prefixes import PrefixFinder
from .slots import SlotStates
from .step_inputs import StepInputs, StepPacker
from .token_logprobs import Logprobs, logprobs_of

if TYPE_CHECKING:
    from chiron_engine.model.loader import CausalLM

logger = logging.getLogger(__name__)

CUDA_PIPELINE_DEPTH = 2
NO_TOKEN = -1


@dataclass(slots=True, eq=False)
class TorchStep:
    """A step under way. `tokens` lies on the host (pinned on CUDA, complete once `done` has passed)
    and holds NO_TOKEN for a row whose logits were all NaN or -inf. graph: its forward pass was replayed."""

    plan: StepPlan
    tokens: Tensor
    logprobs: Logprobs | None = None
    prompts: PromptScores | None = None
    device_s: float = 0.0
    began: torch.cuda.Event | None = field(default=None)
    done: torch.cuda.Event | None = field(default=None)
    graph: bool = False


class TorchExecutor:
    """Carries out step plans with a CausalLM over a device KV pool and, optionally, a host pool.

    On CUDA `submit` returns once the work is queued; on the CPU once it is done. Everything of a
    step is queued in the order the plan promises on one stream: copies out, copies in, forward,
    sampling. The last sampled tokens stay on the device and feed the next step.

    A row with no logit above -inf (a broken checkpoint or an overflow) gets token 0, so that the
    requests beside it go on; `num_invalid_rows` counts such rows and the first is logged.

    decode_graphs: replays the forward passes that it covers; None where all are launched kernel by kernel.
    """

    def __init__(
        self,
        model: CausalLM,
        device_pool: KvPool,
        host_pool: KvPool | None,
        *,
        max_slots: int,
        max_step_tokens: int,
        max_model_len: int,
        prefixes: PrefixFinder | None = None,
    ) -> None:
        self.model = model
        self.device_pool = device_pool
        self.transfer = None
        if host_pool is not None:
            self.transfer = KvTransfer(device_pool, host_pool, _copy_kernel(model.kernels))
        self.device = device_pool.storage.device
        self.num_invalid_rows = 0
        self.decode_graphs: DecodeGraphs | None = None
        self._shape = ExecutorShape(
            block_size=device_pool.block_size,
            num_device_blocks=device_pool.num_blocks,
            num_host_blocks=host_pool.num_blocks if host_pool is not None else 0,
            max_slots=max_slots,
            max_step_tokens=max_step_tokens,
            max_model_len=max_model_len,
            vocab_size=model.spec.vocab_size,
            pipeline_depth=CUDA_PIPELINE_DEPTH if self.device.type == "cuda" else 1,
            has_logits=True,
        )
        table_width = -(-max_model_len // device_pool.block_size)
        self._kernels = model.kernels
        self._states = SlotStates(
            max_slots, table_width, model.spec.vocab_size, max_model_len, self.device, self._kernels
        )
        self._packer = StepPacker(self._states, device_pool.block_size, self._kernels, prefixes)
        self._no_tokens = torch.empty(0, dtype=torch.int64, device=self.device)
        self._under_way: deque[TorchStep] = deque()
        self._closed = False

    @property
    def shape(self) -> ExecutorShape:
        return self._shape

    @property
    def prefixes(self) -> PrefixFinder | None:
        """What finds prefixes that decoding requests share, which are then read once for all of them."""
        return self._packer.prefixes

    @prefixes.setter
    def prefixes(self, finder: PrefixFinder | None) -> None:
        self._packer.prefixes = finder

    def submit(self, plan: StepPlan) -> TorchStep:
        """Start a step. Raises RuntimeError when closed or when too many steps are under way. Any
        other exception leaves slots in an unknown state: the executor is then only good to close."""
        if self._closed:
            raise RuntimeError("the executor is closed")
        if len(self._under_way) >= self._shape.pipeline_depth:
            raise RuntimeError(f"{len(self._under_way)} steps are under way; collect one first")
        with torch.inference_mode():
            step = self._run_on_cuda(plan) if self.device.type == "cuda" else self._run(plan)
        self._under_way.append(step)
        return step

    def _run(self, plan: StepPlan) -> TorchStep:
        start = time.perf_counter()
        step = self._compute(plan)
        step.device_s = time.perf_counter() - start
        return step

    def _run_on_cuda(self, plan: StepPlan) -> TorchStep:
        with torch.cuda.device(self.device):
            began, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            step = self._compute(plan)
            on_host = torch.empty(step.tokens.shape, dtype=step.tokens.dtype, pin_memory=True)
            step.tokens = on_host.copy_(step.tokens, non_blocking=True)
            if step.logprobs is not None:
                step.logprobs = step.logprobs.to_host()
            if step.prompts is not None:
                step.prompts = step.prompts.to_host()
            done.record()
        step.began, step.done = began, done
        return step

    def _compute(self, plan: StepPlan) -> TorchStep:
        """Copies, forward pass and sampling. The tokens are still on the device, and with them how likely
        they and those of prompts were where that is asked for."""
        self._copy_blocks(plan)
        self._states.apply(plan)
        if not (plan.decode.slots or plan.chunks or plan.drafts):
            return TorchStep(plan, self._no_tokens)
        inputs = self._packer.pack(plan)
        if inputs.guides is not None:
            inputs.guides.begin(self._states.last_tokens)
        logits, graph = self._logits(inputs)
        prompts = None
        if inputs.prompts is not None:
            logits, of_prompts = logits.split((len(inputs.sample_rows), len(inputs.prompts.rows)))
            prompts = inputs.prompts.scores(of_prompts, self._kernels)
        if not len(inputs.sample_rows):
            return TorchStep(plan, self._no_tokens, prompts=prompts)
        wanted = self._adjusted(logits, inputs)
        tokens, valid = sample(wanted, inputs.sampling, inputs.token_positions, self._kernels)
        self._states.last_tokens.index_copy_(0, inputs.slots, tokens)
        if plan.drafts:
            rows = sum([draft.count for draft in plan.drafts])
            self._states.settle_drafts(plan.drafts, tokens[-rows:].tolist())
        logprobs = None
        if inputs.logprobs is not None:
            logprobs = logprobs_of(logits, tokens, inputs.logprobs, self._kernels)
        return TorchStep(plan, torch.where(valid, tokens, NO_TOKEN), logprobs, prompts, graph=graph)

    def _logits(self, inputs: StepInputs) -> tuple[Tensor, bool]:
        """Of the rows that are wanted, and whether a graph gave them; it overwrites them in the next step."""
        batch, graphs = inputs.batch, self.decode_graphs
        if graphs is not None and graphs.covers(batch):
            return graphs.logits(batch.decode_slots, batch.decode_lens), True
        logits = self.model.forward(
            inputs.input_ids, inputs.positions, batch, self.device_pool, inputs.logit_rows
        )
        return logits, False

    def _adjusted(self, logits: Tensor, inputs: StepInputs) -> Tensor:
        """The logits as the requests want them; `logits` itself where nobody asks for it as it was."""
        adjustments, guides, last_tokens = inputs.adjustments, inputs.guides, self._states.last_tokens
        if adjustments is None and guides is None:
            return logits
        if inputs.logprobs is not None:
            logits = logits.clone()
        if adjustments is not None:
            adjustments.apply(logits, inputs.token_positions, last_tokens, inputs.longest, self._kernels)
        if guides is not None:
            guides.apply(logits, self._kernels)
        return logits

    def _copy_blocks(self, plan: StepPlan) -> None:
        if not (plan.copies_out or plan.copies_in):
            return
        if self.transfer is None:
            raise ValueError(f"step {plan.step} copies blocks to or from the host; there is no host pool")
        self.transfer.copy_out(plan.copies_out)
        self.transfer.copy_in(plan.copies_in)

    def make_decode_graphs(self) -> DecodeGraphs:
        """Graphs over this executor's memory, with nothing captured yet and not in use."""
        return DecodeGraphs(self.model, self.device_pool, self._packer, self._shape.max_slots)

    def collect(self, handle: TorchStep) -> StepResult:
        """Wait for the oldest step and return its tokens."""
        if not self._under_way or handle is not self._under_way[0]:
            raise ValueError(f"step {handle.plan.step} is not the oldest step under way")
        if handle.done is not None and handle.began is not None:
            handle.done.synchronize()
            handle.device_s = handle.began.elapsed_time(handle.done) / 1e3
        self._under_way.popleft()
        tokens: list[int] = handle.tokens.tolist()
        if NO_TOKEN in tokens:
            tokens = self._replace_invalid(handle.plan, tokens)
        result = StepResult(tokens, handle.device_s, handle.graph)
        if handle.logprobs is not None:
            result.logprobs = handle.logprobs.by_row()
        if handle.prompts is not None:
            result.prompt_logprobs = handle.prompts.by_chunk()
        return result

    def _replace_invalid(self, plan: StepPlan, tokens: list[int]) -> list[int]:
        if not self.num_invalid_rows:
            logger.error("step %d: the model gave a row of logits that are all NaN or -inf", plan.step)
        self.num_invalid_rows += tokens.count(NO_TOKEN)
        return [max(token, 0) for token in tokens]

    def close(self) -> None:
        """Wait for the device and let go of the pools and the model."""
        if self._closed:
            return
        self._closed = True
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._under_way.clear()
        del self.model, self.device_pool, self.transfer, self._states, self._packer, self.decode_graphs
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _copy_kernel(kernels: Kernels) -> CopyBlocks | None:
    """Triton's, which reaches the host's pool as that is pinned beside a GPU."""
    if kernels is not Kernels.TRITON:
        return None
    from chiron_kernels.gpu.block_copy import copy_blocks

    return copy_blocks
