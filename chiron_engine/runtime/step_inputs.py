"""From a step plan to the packed rows of one forward pass: decodes first, then the chunks, then the
drafts, which are chunks all of whose rows sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from chiron_kernels.shared_prefixes import SharedPrefixes
from torch import Tensor

from chiron_engine.model.attention import AttentionBatch, ChunkRows
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.policy.iteration.plan import NO_DECODES, Chunk, DecodeBatch, Draft, StepPlan

from .guides import GuidedRows
from .logit_adjustments import LogitAdjustments
from .prompt_scores import PromptRows, prompt_rows
from .sampler import SamplingRows
from .shared_prefixes import PrefixFinder
from .slots import SlotStates
from .token_logprobs import LogprobRows
from .uploads import IntArray, upload_array

Run = Chunk | Draft


@dataclass(slots=True)
class StepInputs:
    """One forward pass and the sampling after it.

    input_ids, positions: int64 [rows]. sample_rows: int64 [sampled], the rows whose logits are
    wanted. slots: int64 [sampled], where each sampled token goes. token_positions: int64 [sampled],
    the index in its sequence of the token to sample; longest: at least the largest of them.
    adjustments, guides, logprobs, prompts: None where no row asks for any.
    """

    input_ids: Tensor
    positions: Tensor
    batch: AttentionBatch
    sample_rows: Tensor
    slots: Tensor
    token_positions: Tensor
    longest: int
    sampling: SamplingRows
    adjustments: LogitAdjustments | None
    guides: GuidedRows | None
    logprobs: LogprobRows | None
    prompts: PromptRows | None = None

    @property
    def logit_rows(self) -> Tensor:
        """Those to sample, then those of prompts."""
        rows = self.sample_rows
        return rows if self.prompts is None else torch.cat((rows, self.prompts.rows))


class DecodeRows:
    """What is derived from one DecodeBatch, kept for as long as the plan carries the same object. A
    steady step adds one to `lens`."""

    def __init__(self, batch: DecodeBatch, states: SlotStates, prefixes: PrefixFinder | None = None) -> None:
        self.batch = batch
        self.slots_on_host: IntArray = np.array(batch.slots, np.int64)
        self.slots = upload_array(self.slots_on_host, states.device)
        self.rows = torch.arange(len(batch.slots), device=states.device)
        self.sampling = states.sampling.rows(self.slots_on_host, states.device)
        self.adjustments = states.adjustments.rows(self.slots_on_host, len(batch.slots))
        self.guides = states.guides.rows(self.slots_on_host, len(batch.slots))
        self.logprobs = states.logprobs.rows(self.slots_on_host)
        lengths = states.lengths[self.slots_on_host]
        self.lens = upload_array(lengths, states.device)
        self.max_len = int(lengths.max()) if len(lengths) else 0
        self.cascade: SharedPrefixes | None = None
        if prefixes is not None:
            tables, slots = states.tables, self.slots_on_host
            self.cascade = prefixes.shared_prefixes(tables, slots, lengths, states.device)

    def advance(self) -> None:
        """One step later, the same requests."""
        self.lens += 1
        self.max_len += 1


class StepPacker:
    """Builds the inputs of each step from its plan and the states of the slots. prefixes: finds those that
    decoding requests share, where the attention has a use for them."""

    def __init__(
        self,
        states: SlotStates,
        block_size: int,
        kernels: Kernels = Kernels.TORCH,
        prefixes: PrefixFinder | None = None,
    ) -> None:
        self._states = states
        self._block_size = block_size
        self._find_places = _places_by_kernel if kernels is Kernels.TRITON else _places
        self.prefixes = prefixes
        self._decodes = DecodeRows(NO_DECODES, states)

    def pack(self, plan: StepPlan) -> StepInputs:
        """The inputs of the plan's forward pass. Call once per plan, after `SlotStates.apply`; where it
        has drafts, `SlotStates.settle_drafts` is to follow."""
        decodes = self._advance_decodes(plan)
        input_ids, positions, batch = self.decode_rows(decodes.slots, decodes.lens, decodes.max_len)
        batch.cascade = decodes.cascade
        inputs = StepInputs(
            input_ids=input_ids,
            positions=positions,
            batch=batch,
            sample_rows=decodes.rows,
            slots=decodes.slots,
            token_positions=decodes.lens,
            longest=decodes.max_len,
            sampling=decodes.sampling,
            adjustments=decodes.adjustments,
            guides=decodes.guides,
            logprobs=decodes.logprobs,
        )
        if plan.chunks or plan.drafts:
            self._add_runs(plan, inputs)
        if plan.chunks:
            of_chunks = inputs.batch.chunks[: len(plan.chunks)]
            inputs.prompts = prompt_rows(plan, of_chunks, self._states)
        # The token sampled in this step is known from the next one on.
        self._states.lengths[decodes.slots_on_host] += 1
        for chunk in plan.chunks:
            self._states.lengths[chunk.slot] = chunk.start + chunk.count + chunk.samples
        return inputs

    def decode_rows(
        self, slots: Tensor, lens: Tensor, max_len: int | None = None
    ) -> tuple[Tensor, Tensor, AttentionBatch]:
        """Token ids and positions, int64 [B], and the batch of a forward pass over the newest token of each
        slot. slots, lens: int64 [B], on the device; the lengths count that token. max_len: at least the
        largest of them; None is what a block table holds."""
        positions, tables = lens - 1, self._states.device_tables
        blocks, offsets = self._find_places(positions, slots, tables, self._block_size)
        batch = AttentionBatch(
            num_decodes=len(slots),
            tables=tables,
            decode_slots=slots,
            decode_lens=lens,
            max_decode_len=tables.shape[1] * self._block_size if max_len is None else max_len,
            chunks=[],
            write_blocks=blocks,
            write_offsets=offsets,
        )
        return self._states.last_tokens.index_select(0, slots), positions, batch

    def _advance_decodes(self, plan: StepPlan) -> DecodeRows:
        if plan.decode is not self._decodes.batch:
            self._decodes = DecodeRows(plan.decode, self._states, self.prefixes)
        elif plan.decode.slots:
            self._decodes.advance()
        return self._decodes

    def _add_runs(self, plan: StepPlan, inputs: StepInputs) -> None:
        """Append the rows of the chunks and the drafts, and those of them that sample."""
        states, device = self._states, self._states.device
        runs: list[Run] = [*plan.chunks, *plan.drafts]
        inputs.batch.chunks = _chunk_rows(runs, inputs.batch.num_decodes)
        packed = upload_array(np.concatenate([self._columns(run) for run in runs], axis=1), device)
        inputs.input_ids = torch.cat((inputs.input_ids, packed[0]))
        inputs.positions = torch.cat((inputs.positions, packed[1]))
        inputs.batch.write_blocks = torch.cat((inputs.batch.write_blocks, packed[2]))
        inputs.batch.write_offsets = torch.cat((inputs.batch.write_offsets, packed[3]))
        sampled = [
            (rows.row_start + index, run.slot, run.start + index + 1)
            for run, rows in zip(runs, inputs.batch.chunks, strict=True)
            for index in _sampled(run)
        ]
        if not sampled:
            return
        rows_slots_positions = np.array(sampled, np.int64).T
        new = upload_array(rows_slots_positions, device)
        inputs.sample_rows = torch.cat((inputs.sample_rows, new[0]))
        inputs.slots = torch.cat((inputs.slots, new[1]))
        inputs.token_positions = torch.cat((inputs.token_positions, new[2]))
        slots = np.concatenate((self._decodes.slots_on_host, rows_slots_positions[1]))
        inputs.longest = max(inputs.longest, int(rows_slots_positions[2].max()))
        inputs.sampling = states.sampling.rows(slots, device)
        inputs.adjustments = states.adjustments.rows(slots, inputs.batch.num_decodes)
        inputs.guides = states.guides.rows(slots, inputs.batch.num_decodes)
        inputs.logprobs = states.logprobs.rows(slots)

    def _columns(self, run: Run) -> IntArray:
        """Token, position, block and offset of each row of a run: [4, count]."""
        positions = np.arange(run.start, run.start + run.count)
        blocks = self._states.tables[run.slot, positions // self._block_size]
        if isinstance(run, Draft):
            tokens: IntArray = np.array(run.tokens, np.int64)
        else:
            tokens = self._states.known_tokens(run.slot, run.start, run.count)
        return np.stack((tokens, positions, blocks, positions % self._block_size))


def _places(positions: Tensor, slots: Tensor, tables: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Block and offset of the tokens at these positions of these slots, int64 [rows] each."""
    return tables[slots, positions // block_size], positions % block_size


def _places_by_kernel(
    positions: Tensor, slots: Tensor, tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """The same in one launch."""
    from chiron_kernels.gpu.slot_mapping import slot_mapping

    return slot_mapping(positions, slots, tables, block_size)


def _chunk_rows(runs: Sequence[Run], row: int) -> list[ChunkRows]:
    """Where the rows of the runs lie, the first of them at `row`."""
    found = []
    for run in runs:
        found.append(ChunkRows(row_start=row, count=run.count, context=run.start, slot=run.slot))
        row += run.count
    return found


def _sampled(run: Run) -> range:
    """Rows of a run whose logits are wanted."""
    if isinstance(run, Draft):
        return range(run.count)
    return range(run.count - 1, run.count) if run.samples else range(0)
