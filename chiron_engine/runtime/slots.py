"""What the executor remembers of each slot between steps: its block table, its known tokens, how
many there are, and the token sampled last, which stays on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.policy.iteration.drafts import num_verified
from chiron_engine.policy.iteration.plan import Draft, Grown, Joined, StepPlan

from .guides import GuideTable
from .logit_adjustments import AdjustmentTable
from .sampler import SamplingTable
from .token_logprobs import LogprobTable
from .uploads import IntArray, upload_array


class SlotStates:
    """State of every slot, on the host as arrays and, where a forward pass reads it, on the device.

    lengths[slot]: known tokens of the sequence; the KV of the last one is computed when it decodes.
    tables[slot, i]: block i of the sequence. On the CPU `device_tables` is the same memory.
    What is on the device is changed in place and never replaced: captured graphs read it where it is.
    """

    def __init__(
        self,
        max_slots: int,
        table_width: int,
        vocab_size: int,
        max_model_len: int,
        device: torch.device,
        kernels: Kernels = Kernels.TORCH,
    ) -> None:
        self.device = device
        self.lengths: IntArray = np.zeros(max_slots, np.int64)
        self.tables: IntArray = np.zeros((max_slots, table_width), np.int64)
        self.sampling = SamplingTable(max_slots, vocab_size, every_row=kernels is Kernels.TRITON)
        self.adjustments = AdjustmentTable(max_slots, max_model_len, device)
        self.logprobs = LogprobTable(max_slots, device)
        self.guides = GuideTable(vocab_size, device)
        self.last_tokens = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self.device_tables: Tensor = torch.from_numpy(self.tables)
        if device.type != "cpu":
            self.device_tables = self.device_tables.to(device)
        self._tokens: dict[int, IntArray] = {}

    def apply(self, plan: StepPlan) -> None:
        """Take in who left, who joined and which tables grew, in this order."""
        for slot in plan.left:
            self._tokens.pop(slot, None)
            self.adjustments.drop(slot)
            self.guides.drop(slot)
            self.lengths[slot] = 0
        for joined in plan.joined:
            self._join(joined)
        for grown in plan.grown:
            self.tables[grown.slot, grown.index] = grown.block
        if self.device.type != "cpu":
            self._update_device(plan.joined, plan.grown)

    def _join(self, joined: Joined) -> None:
        if joined.token_ids is None:
            raise ValueError(f"slot {joined.slot} joins without token values, which a model needs")
        if len(joined.blocks) > self.tables.shape[1]:
            raise ValueError(
                f"slot {joined.slot} joins with {len(joined.blocks)} blocks; "
                f"a table holds {self.tables.shape[1]}"
            )
        row = self.tables[joined.slot]
        row[: len(joined.blocks)] = joined.blocks
        row[len(joined.blocks) :] = 0
        tokens = self._tokens[joined.slot] = np.asarray(joined.token_ids, dtype=np.int64)
        self.lengths[joined.slot] = joined.num_computed
        self.sampling.set(joined.slot, joined.request.sampling, joined.request.seed)
        self.adjustments.set(joined.slot, joined.request, tokens)
        self.logprobs.set(joined.slot, joined.request.sampling.logprobs)
        self.guides.set(joined.slot, joined.request, tokens)

    def _update_device(self, joined: list[Joined], grown: list[Grown]) -> None:
        """Mirror the changed rows and entries on the device, in stream order."""
        if joined:
            slots = np.array([j.slot for j in joined], np.int64)
            rows = upload_array(self.tables[slots], self.device)
            self.device_tables.index_copy_(0, upload_array(slots, self.device), rows)
        if grown:
            entries = np.array([(g.slot, g.index, g.block) for g in grown], np.int64).T
            slots_on_device, indices, blocks = upload_array(entries, self.device)
            self.device_tables.index_put_((slots_on_device, indices), blocks)

    def settle_drafts(self, drafts: Sequence[Draft], sampled: Sequence[int]) -> None:
        """Go on behind the tokens that hold. sampled: after every row of the drafts."""
        row = 0
        for draft in drafts:
            brought = sampled[row : row + draft.count]
            row += draft.count
            held = num_verified(draft.tokens, brought)
            self.lengths[draft.slot] = draft.start + 1 + held
            self.last_tokens[draft.slot] = brought[held - 1]

    def known_tokens(self, slot: int, start: int, count: int) -> IntArray:
        """Tokens [start, start + count) of a request as it joined."""
        tokens = self._tokens[slot]
        if start + count > len(tokens):
            raise ValueError(
                f"chunk [{start}, {start + count}) of slot {slot}, which knows {len(tokens)} tokens"
            )
        return tokens[start : start + count]
