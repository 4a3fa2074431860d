"""An executor without a model that checks every block it reads.

The KV entry of a position is a hash of all tokens up to it, and the next token is a function of
that hash and, most often, of the last token alone, so that guesses at it hold now and then. So a
wrong block table, a block reused too early or a copy out of order shows at the first row that reads
it, and outputs have one right value whatever the batching.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.null_executor import PlannedStep
from chiron_engine.policy.iteration.drafts import num_verified
from chiron_engine.policy.iteration.plan import Draft, StepPlan, StepResult

MODULUS = (1 << 61) - 1


def extend(prefix: int, token: int) -> int:
    return (prefix * 1_000_003 + token + 1) % MODULUS


def next_token(prefix: int, last: int, vocab_size: int) -> int:
    bits = prefix ^ (prefix >> 17)
    return (bits >> 3) % vocab_size if bits % 8 == 0 else (3 * last + 1) % 7


def reference_output(prompt: list[int], max_tokens: int, stop_ids: frozenset[int], vocab: int) -> list[int]:
    prefix = 0
    for token in prompt:
        prefix = extend(prefix, token)
    output: list[int] = []
    while len(output) < max_tokens:
        token = next_token(prefix, (output or prompt)[-1], vocab)
        output.append(token)
        if token in stop_ids:
            break
        prefix = extend(prefix, token)
    return output


@dataclass
class Slot:
    tokens: list[int]
    table: list[int]
    computed: int
    decoding: bool = field(default=False)


class CheckedExecutor:
    def __init__(self, shape: ExecutorShape) -> None:
        self.shape = shape
        self.device: dict[tuple[int, int], int] = {}
        self.host: dict[tuple[int, int], int] = {}
        self.slots: dict[int, Slot] = {}
        self.last_step = -1

    def submit(self, plan: StepPlan) -> tuple[PlannedStep, list[int]]:
        assert plan.step == self.last_step + 1
        self.last_step = plan.step
        for copy in plan.copies_out:
            self._copy(self.device, copy.device, self.host, copy.host)
        for copy in plan.copies_in:
            self._copy(self.host, copy.host, self.device, copy.device)
        self._track(plan)
        tokens = [self._decode(slot) for slot in plan.decode.slots]
        for chunk in plan.chunks:
            slot = self.slots[chunk.slot]
            assert not slot.decoding and chunk.start == slot.computed and chunk.count > 0
            self._compute(slot, chunk.start + chunk.count)
            if chunk.samples:
                assert chunk.start + chunk.count == len(slot.tokens)
                tokens.append(self._sample(slot))
                slot.decoding = True
        for draft in plan.drafts:
            tokens += self._verify(self.slots[draft.slot], draft)
        return PlannedStep(plan), tokens

    def collect(self, handle: tuple[PlannedStep, list[int]]) -> StepResult:
        return StepResult(handle[1])

    def close(self) -> None:
        self.slots.clear()

    def _track(self, plan: StepPlan) -> None:
        for slot in plan.left:
            del self.slots[slot]
        for joined in plan.joined:
            assert joined.slot not in self.slots
            assert joined.token_ids is not None
            self.slots[joined.slot] = Slot(list(joined.token_ids), list(joined.blocks), joined.num_computed)
        for grown in plan.grown:
            table = self.slots[grown.slot].table
            assert grown.index == len(table)
            table.append(grown.block)
        decoding = [s for s, slot in self.slots.items() if slot.decoding]
        assert len(set(plan.decode.slots)) == len(plan.decode.slots) and set(plan.decode.slots) <= set(
            decoding
        )

    def _copy(self, source: dict, source_block: int, target: dict, target_block: int) -> None:
        for offset in range(self.shape.block_size):
            target[target_block, offset] = source[source_block, offset]

    def _decode(self, number: int) -> int:
        slot = self.slots[number]
        assert slot.decoding and slot.computed == len(slot.tokens) - 1
        self._compute(slot, len(slot.tokens))
        return self._sample(slot)

    def _compute(self, slot: Slot, end: int) -> None:
        """Write the entries of [computed, end), then read all of [0, end) back and check them."""
        prefix = 0
        for position in range(end):
            prefix = extend(prefix, slot.tokens[position])
            place = (slot.table[position // self.shape.block_size], position % self.shape.block_size)
            if position >= slot.computed:
                self.device[place] = prefix
            assert self.device[place] == prefix, f"position {position} reads a wrong block"
        slot.computed = end

    def _verify(self, slot: Slot, draft: Draft) -> list[int]:
        """Compute all of a draft; go on behind what holds, with no block that it does not need."""
        assert slot.decoding and draft.start == slot.computed == len(slot.tokens) - 1
        assert draft.count > 1 and draft.tokens[0] == slot.tokens[-1]
        known = list(slot.tokens)
        slot.tokens += draft.tokens[1:]
        self._compute(slot, len(slot.tokens))
        sampled = [self._next(slot.tokens[: len(known) + row]) for row in range(draft.count)]
        held = num_verified(draft.tokens, sampled)
        slot.tokens, slot.computed = known + sampled[:held], draft.start + held
        del slot.table[-(-slot.computed // self.shape.block_size) :]
        return sampled

    def _sample(self, slot: Slot) -> int:
        token = self._next(slot.tokens)
        slot.tokens.append(token)
        return token

    def _next(self, tokens: list[int]) -> int:
        prefix = 0
        for token in tokens:
            prefix = extend(prefix, token)
        return next_token(prefix, tokens[-1], self.shape.vocab_size)
