"""Attention of one step and layer over the paged pool: prompts, decodes, or both in two launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.attention_inputs import AttentionInputs, Request, make_inputs
from benchmarks.case import Goal, Prepared, Work

ERROR_LIMIT = 8e-3
"""Relative error of bfloat16, twice what is accepted of a kernel where all rows are looked at."""

TINY_KEYS, TINY_REQUESTS, TINY_KV_HEADS = 80, 2, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """prompts: first in the batch. decodes: keys of each decoding request, its `query_len` new tokens
    included. shared: keys that all requests have in common; cascade: which are read once for all of them, and
    timed beside decode attention, of one new token each and without prompts. Everything in bfloat16, but for
    keys and values where kv_dtype says otherwise."""

    name: str
    prompts: tuple[Request, ...] = ()
    decodes: tuple[int, ...] = ()
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    query_len: int = 1
    window: int | None = None
    shared: int = 0
    kv_dtype: torch.dtype = torch.bfloat16
    cascade: bool = False
    goal: Goal | None = None

    @property
    def kernels(self) -> tuple[str, ...]:
        decode = "cascade_attention" if self.cascade else "decode_attention"
        wanted = (("prefill_attention", self.prompts), (decode, self.decodes))
        return tuple(name for name, some in wanted if some)

    @property
    def requests(self) -> tuple[Request, ...]:
        decoding = (Request(self.query_len, keys - self.query_len) for keys in self.decodes)
        return (*self.prompts, *decoding)

    def work(self) -> Work:
        """Keys and values that are seen, shared ones once, and queries and results; 4 Hq D operations for
        each pair of a query and a key it sees."""
        rows = sum(request.tokens for request in self.requests)
        seen = sum(self._keys_seen(request) for request in self.requests)
        seen -= self.shared * (len(self.requests) - 1)
        pairs = sum(self._pairs(request) for request in self.requests)
        token = 2 * self.kv_heads * self.head_dim * self.kv_dtype.itemsize
        row = 2 * self.heads * self.head_dim * torch.bfloat16.itemsize
        return Work(seen * token + rows * row, 4 * self.heads * self.head_dim * pairs)

    def _keys_seen(self, request: Request) -> int:
        """By any of its rows."""
        if self.window is None:
            return request.keys
        return min(request.keys, self.window + request.tokens - 1)

    def _pairs(self, request: Request) -> int:
        if self.window is None:
            return request.tokens * request.context + request.tokens * (request.tokens + 1) // 2
        return sum(min(position + 1, self.window) for position in range(request.context, request.keys))

    def tiny(self) -> AttentionCase:
        """Two requests of each kind with two key heads, each with as many query heads as before."""
        lengths = (TINY_KEYS, TINY_KEYS - 7)
        prompts = tuple(
            Request(min(request.tokens, 20), min(request.context, TINY_KEYS // 2))
            for request in self.prompts[:TINY_REQUESTS]
        )
        return replace(
            self,
            prompts=prompts,
            decodes=tuple(map(min, self.decodes, lengths)),
            heads=self.heads // self.kv_heads * min(self.kv_heads, TINY_KV_HEADS),
            kv_heads=min(self.kv_heads, TINY_KV_HEADS),
            window=None if self.window is None else min(self.window, TINY_KEYS // 2),
            shared=min(self.shared, self.block_size),
        )

    def prepare(self, device: torch.device, copies: int) -> Prepared:
        """What does not differ from layer to layer is computed before, as the engine does it once a step."""
        inputs = make_inputs(
            self.requests,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.block_size,
            copies,
            device,
            self.window,
            self.shared,
            self.kv_dtype,
        )
        decode, alternatives = self._decode(inputs), {}
        if self.cascade:
            alternatives["decode_attention"] = _calls([decode], inputs)
            decode = self._cascade(inputs)
        return Prepared(
            _calls([self._prefill(inputs), decode], inputs),
            lambda i, parts: inputs.error(i, torch.cat(parts)),
            ERROR_LIMIT,
            # Peers are prepared for keys and values of the type of the queries.
            inputs if self.kv_dtype == inputs.q.dtype else None,
            alternatives,
        )

    def _prefill(self, inputs: AttentionInputs) -> Callable[[torch.Tensor], torch.Tensor] | None:
        if not self.prompts:
            return None
        from chiron_kernels.gpu.prefill_attention import prefill_attention
        from chiron_kernels.gpu.query_blocks import query_blocks

        count = len(self.prompts)
        starts = inputs.query_starts()[: count + 1]
        q = inputs.q[: starts[-1]]
        query_starts = inputs.numbers(starts)
        contexts = inputs.numbers([request.context for request in self.prompts])
        rows = inputs.numbers(list(range(count)))
        group = self.heads // self.kv_heads
        blocks = query_blocks(query_starts, contexts, starts[-1], group, self.head_dim)
        longest = max(request.keys for request in self.prompts)

        def attend(kv: torch.Tensor) -> torch.Tensor:
            return prefill_attention(
                q,
                kv,
                inputs.tables,
                rows,
                query_starts,
                contexts,
                blocks,
                inputs.scale,
                window=self.window,
                max_len=longest,
            )

        return attend

    def _decode(self, inputs: AttentionInputs) -> Callable[[torch.Tensor], torch.Tensor] | None:
        if not self.decodes:
            return None
        from chiron_kernels.gpu.decode_attention import decode_attention
        from chiron_kernels.gpu.decode_splits import decode_splits

        before = len(self.prompts)
        q = inputs.q[inputs.query_starts()[before] :]
        lens = inputs.numbers(list(self.decodes))
        rows = inputs.numbers(list(range(before, len(self.requests))))
        splits = decode_splits(
            lens, inputs.layers[0], inputs.tables, query_len=self.query_len, window=self.window
        )

        def attend(kv: torch.Tensor) -> torch.Tensor:
            return decode_attention(
                q,
                kv,
                inputs.tables,
                rows,
                lens,
                splits,
                inputs.scale,
                window=self.window,
                query_len=self.query_len,
            )

        return attend

    def _cascade(self, inputs: AttentionInputs) -> Callable[[torch.Tensor], torch.Tensor]:
        """One group of all requests."""
        from chiron_kernels.gpu.cascade_attention import cascade_attention, cascade_step
        from chiron_kernels.shared_prefixes import SharedPrefixes

        count = len(self.decodes)
        rows = inputs.numbers(list(range(count)))
        shared = SharedPrefixes(
            members=rows,
            starts=inputs.numbers([0, count]),
            table_rows=inputs.numbers([0]),
            lens=inputs.numbers([self.shared]),
            skipped=inputs.numbers([self.shared] * count),
            longest=self.shared,
            everyone=True,
        )
        lens = inputs.numbers(list(self.decodes))
        step = cascade_step(shared, lens, inputs.layers[0], inputs.tables, rows, self.heads)

        def attend(kv: torch.Tensor) -> torch.Tensor:
            return cascade_attention(inputs.q, kv, step, inputs.scale)

        return attend


def _calls(
    parts: Sequence[Callable[[torch.Tensor], torch.Tensor] | None], inputs: AttentionInputs
) -> list[Callable[[], list[torch.Tensor]]]:
    """For each layer, of the parts that there are."""
    used = [part for part in parts if part is not None]
    return [functools.partial(_attend, used, layer) for layer in inputs.layers]


def _attend(parts: list[Callable[[torch.Tensor], torch.Tensor]], kv: torch.Tensor) -> list[torch.Tensor]:
    """The results of prompts and of decodes, apart: putting them together is no work of these kernels."""
    return [part(kv) for part in parts]
