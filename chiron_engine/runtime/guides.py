"""Outputs that follow a JSON schema, a regular expression or a grammar.

llguidance says after each token which may come next. That needs the tokens on the host: where steps are
under way ahead of it, a step with guided rows waits for the one before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from chiron_kernels.cpu import sampling as compiled
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from torch import Tensor

from chiron_engine.model.kernel_choice import Kernels, best_kernels, library_of
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import Guide

from .uploads import IntArray, upload_array

log = logging.getLogger(__name__)

KEPT = 64
COMPILE_STACK = 64 << 20
_STACK_SIZE = threading.Lock()
"""Held while the stack size of new threads is another than usual."""
WORD_BITS = 32
GRAMMARS: dict[str, Callable[[str], str]] = {
    "json_schema": LLMatcher.grammar_from_json_schema,
    "regex": LLMatcher.grammar_from_regex,
    "grammar": LLMatcher.grammar_from_lark,
}


class CompiledGuide:
    """Safe to share: each output is followed by a matcher of its own."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def follow(self, output: Sequence[int]) -> LLMatcher:
        """A matcher that has seen these tokens."""
        matcher = self._matcher.deep_copy()
        if output:
            matcher.consume_tokens(list(output))
        return matcher


class GuideCompiler:
    """For the tokenizer of one model. Safe to use from several threads."""

    def __init__(self, directory: Path, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._path = directory / "tokenizer.json"
        self._vocab_size = vocab_size
        self._end_ids = list(end_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._kept = lru_cache(maxsize=KEPT)(self._compile)

    def compile(self, guide: Guide) -> CompiledGuide:
        """Usually in milliseconds, up to a second for the largest; the first also reads the tokenizer.
        Raises ValueError."""
        return self._kept(guide)

    def _compile(self, guide: Guide) -> CompiledGuide:
        tokenizer, grammar = self._read_tokenizer(), GRAMMARS[guide.kind](guide.text)
        matcher = _with_large_stack(lambda: LLMatcher(tokenizer, grammar, log_level=0))
        if matcher.is_error():
            raise ValueError(f"{guide.kind} cannot be followed: {_first_line(matcher.get_error())}")
        return CompiledGuide(matcher)

    def _read_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is not None:
                return self._tokenizer
            if not self._path.is_file() or not self._end_ids:
                raise ValueError("no guide can be followed: the model has no tokenizer.json or no end token")
            self._tokenizer = LLTokenizer(str(self._path), n_vocab=self._vocab_size, eos_token=self._end_ids)
            return self._tokenizer


def _with_large_stack(work: Callable[[], LLMatcher]) -> LLMatcher:
    """The library goes down a chain of rules by recursion, and a stack that overflows ends the process:
    the longest chain that a guide's size allows needs some 25 MB."""
    with _STACK_SIZE:
        before = threading.stack_size(COMPILE_STACK)
        try:
            thread = ThreadPoolExecutor(1, "compile-guide")
            compiled = thread.submit(work)  # which starts the thread
        finally:
            threading.stack_size(before)
    with thread:
        return compiled.result()


class GuidedRows:
    """The rows of one batch that follow a guide, for as long as they are the same requests."""

    def __init__(
        self, rows: IntArray, matchers: list[LLMatcher], decode_slots: Tensor, num_rows: int, vocab_size: int
    ) -> None:
        """rows: those of them, out of `num_rows`. decode_slots: of those that decode, which come first."""
        self._rows = None if len(rows) == num_rows else upload_array(rows, decode_slots.device)
        self._matchers = matchers
        self._decode_slots = decode_slots
        self._masks = np.empty((len(matchers), -(-vocab_size // WORD_BITS)), np.int32)
        self._sampled: SampledTokens | None = None

    def begin(self, last_tokens: Tensor) -> None:
        """To be called before the forward pass is queued. last_tokens: int64 [slots], sampled last."""
        self._sampled = SampledTokens(last_tokens[self._decode_slots])

    def apply(self, logits: Tensor, kernels: Kernels | None = None) -> None:
        """Take what a guide forbids out of `logits` [rows, vocab]. To be called once for each token of a
        row, in order; on CUDA the host works while the device computes the forward pass. kernels: None is
        the best for the device."""
        assert self._sampled is not None  # begun
        for matcher, token in zip(self._matchers, self._sampled.wait(), strict=False):
            if not matcher.consume_token(token):  # all that it allows from now on is the end
                log.warning("an output left its guide and ends: %s", _first_line(matcher.get_error()))
        compute_masks(self._matchers, self._masks)
        forbid(logits, self._rows, self._masks, kernels)


class SampledTokens:
    """Tokens on their way to the host. On CUDA the copy is queued before the forward pass, so that reading
    them waits for the step before and not for that."""

    def __init__(self, tokens: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._tokens = tokens
        if tokens.device.type == "cuda":
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> list[int]:
        if self._done is not None:
            self._done.synchronize()
        tokens: list[int] = self._tokens.tolist()
        return tokens


class GuideTable:
    """The matcher of the request in each slot that follows a guide."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._matchers: dict[int, LLMatcher] = {}

    def set(self, slot: int, request: Request, tokens: IntArray) -> None:
        """tokens: all that it knows."""
        self._matchers.pop(slot, None)
        if request.guide is None:
            return
        assert isinstance(request.guide, CompiledGuide)  # the serving layer made it
        first = len(request.prompt_ids) - request.num_prior_outputs
        self._matchers[slot] = request.guide.follow(tokens[first:].tolist())

    def drop(self, slot: int) -> None:
        self._matchers.pop(slot, None)

    def rows(self, slots: IntArray, num_decodes: int) -> GuidedRows | None:
        """For the given slots, in their order, of which the first `num_decodes` decode."""
        if not self._matchers:
            return None
        found = [(row, slot) for row, slot in enumerate(slots.tolist()) if slot in self._matchers]
        if not found:
            return None
        decode_slots = np.array([slot for row, slot in found if row < num_decodes], np.int64)
        return GuidedRows(
            np.array([row for row, _ in found], np.int64),
            [self._matchers[slot] for _, slot in found],
            upload_array(decode_slots, self._device),
            len(slots),
            self._vocab_size,
        )


@lru_cache(maxsize=1)
def _executor() -> LLExecutor:
    """Threads of their own, as many as torch has; torch's wait meanwhile, or feed the device."""
    return LLExecutor(torch.get_num_threads())


def compute_masks(matchers: list[LLMatcher], masks: np.ndarray) -> None:
    """masks: int32 [matchers, words], a bit for each token, 1 where it is allowed."""
    places = [(matcher, row) for row, matcher in enumerate(matchers)]
    _executor().unsafe_compute_mask_ptr(places, masks.ctypes.data, masks.strides[0], len(masks))


def forbid(logits: Tensor, rows: Tensor | None, masks: np.ndarray, kernels: Kernels | None = None) -> None:
    """Set `logits` [rows, vocab] to -inf in place where the bit of `masks` [N, words] is 0: of the rows
    `rows` [N], or of all."""
    library = library_of(kernels or best_kernels(logits.device), logits.device)
    if library is not None:
        compiled.forbid(library, logits, rows, masks)
    else:
        _forbid_with_torch(logits, rows, masks)


def _forbid_with_torch(logits: Tensor, rows: Tensor | None, masks: np.ndarray) -> None:
    forbidden = forbidden_tokens(upload_array(masks, logits.device), logits.shape[1])
    if rows is None:
        logits.masked_fill_(forbidden, -torch.inf)
        return
    some = logits.index_select(0, rows).masked_fill_(forbidden, -torch.inf)
    logits.index_copy_(0, rows, some)


def forbidden_tokens(masks: Tensor, vocab_size: int) -> Tensor:
    """bool [rows, vocab] from int32 [rows, words], a bit for each token, 1 where it is allowed."""
    bits = torch.arange(WORD_BITS, device=masks.device, dtype=torch.int32)
    allowed = (masks.unsqueeze(2) >> bits) & 1
    return allowed.flatten(1)[:, :vocab_size] == 0


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"
