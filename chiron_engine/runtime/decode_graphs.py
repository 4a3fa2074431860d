"""Forward passes of steps that only decode, recorded once and replayed: the host then hands over one graph in
place of preparing hundreds of launches.

There is a graph for each of some numbers of rows; a step takes the next larger one and pads. All that
differs between two steps of a size is on the device, at addresses that never change: the slots and lengths of
the rows (copied in before a replay), the block tables and last tokens of all slots (kept up to date in
place), the KV pool, the weights. Token ids, positions and places in the pool are derived inside the graph.
Sizes of launches follow from the number of rows and from how long a block table is, never from lengths.

**A row of length 0 is padding, whatever its slot.** Its position is -1, for which `slot_mapping` gives no
block, so that nothing is written for it; `decode_splits` gives it no tile, so that no key is read; what
attention gives is zeros, so that the rest of the pass stays finite. No other row sees it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chiron_engine.model.attention import AttentionBatch
from chiron_engine.model.kv_pool import KvPool

from .step_inputs import StepPacker

if TYPE_CHECKING:
    from chiron_engine.model.loader import CausalLM

Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Records work, which it may run as often as it likes. What comes back does it again in the same memory."""

LARGEST = 512
"""Rows of the largest graph, as in vLLM. A step of more is launched kernel by kernel."""


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Rows of the graphs, ascending: those of vLLM, and last max_num_seqs or LARGEST."""
    largest = min(max_num_seqs, LARGEST)
    usual = (1, 2, 4, *range(8, 256, 8), *range(256, LARGEST, 16))
    return [*(size for size in usual if size < largest), largest]


class DecodeGraphs:
    """The graphs of one executor. Everything is called under torch.inference_mode, on one stream."""

    def __init__(self, model: CausalLM, pool: KvPool, packer: StepPacker, max_slots: int) -> None:
        self.sizes = capture_sizes(max_slots)
        self._model, self._pool, self._packer = model, pool, packer
        self._rows = torch.arange(self.largest, device=pool.device)
        self._slots, self._lens = torch.zeros_like(self._rows), torch.zeros_like(self._rows)
        # One for all sizes: each replay's logits are used up before the next one.
        self._logits = torch.empty(self.largest, model.spec.vocab_size, device=pool.device)
        self._replays: dict[int, Work] = {}

    @property
    def largest(self) -> int:
        return self.sizes[-1]

    def capture(self, capture: Capture) -> None:
        """Record all sizes, the largest first: the smaller ones then find room in what it took. All rows are
        padding meanwhile."""
        self._lens.zero_()
        for size in reversed(self.sizes):
            self._replays[size] = capture(partial(self._compute, size))

    def covers(self, batch: AttentionBatch) -> bool:
        """Whether a step is replayed. This alone decides: chunks, drafts and prefixes that rows share differ
        from step to step in the sizes of their launches."""
        return not batch.chunks and batch.cascade is None and 0 < batch.num_decodes <= self.largest

    def logits(self, slots: Tensor, lens: Tensor) -> Tensor:
        """float32 [B, vocab_size], good until the next call, for the newest token of each slot. slots, lens:
        int64 [B], on the device, B up to `largest`."""
        count = len(slots)
        size = self.sizes[bisect_left(self.sizes, count)]
        self._slots[:count].copy_(slots)
        self._lens[:count].copy_(lens)
        self._lens[count:size].zero_()
        self._replays[size]()
        return self._logits[:count]

    def eager_logits(self, slots: Tensor, lens: Tensor) -> Tensor:
        """The same without a graph, in memory of its own."""
        input_ids, positions, batch = self._packer.decode_rows(slots, lens)
        return self._model.forward(input_ids, positions, batch, self._pool, self._rows[: len(slots)])

    def _compute(self, size: int) -> None:
        self._logits[:size].copy_(self.eager_logits(self._slots[:size], self._lens[:size]))
