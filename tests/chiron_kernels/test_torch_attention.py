"""The torch attention over paged KV against sums written out one score at a time."""

from __future__ import annotations

import math

import pytest
import torch
from chiron_kernels.torch_attention import chunk_attention, chunk_mask, decode_attention, decode_mask
from chiron_kernels.torch_kv import gather_kv, write_kv

HQ, HKV, D = 6, 2, 8
OPTIONS = [
    {},
    {"window": 3},
    {"softcap": 2.0},
    {"sinks": True},
    {"window": 4, "softcap": 1.5, "sinks": True},
]


def by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One row q [Hq, D] at `position` over k, v [L, Hkv, D], in float64."""
    first = 0 if window is None else max(0, position - window + 1)
    out = torch.zeros(HQ, D, dtype=torch.float64)
    for head in range(HQ):
        keys, values = k[:, head // (HQ // HKV)].double(), v[:, head // (HQ // HKV)].double()
        scores = [float(q[head].double() @ keys[j]) * scale for j in range(first, position + 1)]
        if softcap is not None:
            scores = [softcap * math.tanh(score / softcap) for score in scores]
        extra = [] if sinks is None else [float(sinks[head])]
        total = sum(math.exp(score) for score in scores + extra)
        for j, score in zip(range(first, position + 1), scores, strict=True):
            out[head] += math.exp(score) / total * values[j]
    return out


def options_of(option: dict[str, object]) -> tuple[int | None, dict[str, object]]:
    rest = {"softcap": option.get("softcap")}
    rest["sinks"] = torch.linspace(-1, 2, HQ) if option.get("sinks") else None
    return option.get("window"), rest  # type: ignore[return-value]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("context", [0, 5])
def test_chunk_equals_sums(option: dict[str, object], context: int) -> None:
    torch.manual_seed(0)
    window, rest = options_of(option)
    count, length = 7, context + 7
    q, k, v = torch.randn(count, HQ, D), torch.randn(length, HKV, D), torch.randn(length, HKV, D)
    plain = context == 0 and window is None
    mask = None if plain else chunk_mask(count, context, window, q.dtype, q.device)
    out = chunk_attention(q, k, v, mask, 0.3, **rest)
    for row in range(count):
        expected = by_hand(q[row], k, v, context + row, 0.3, window, **rest)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_decode_equals_sums(option: dict[str, object]) -> None:
    torch.manual_seed(1)
    window, rest = options_of(option)
    lens = torch.tensor([1, 8, 5, 12])
    first = torch.tensor([0, 0, 0, 0])
    q, kv = torch.randn(4, HQ, D), torch.randn(4, 12, 2, HKV, D)
    out = decode_attention(q, kv, decode_mask(lens, first, 12, window, q.dtype), 0.4, **rest)
    for row, length in enumerate(lens.tolist()):
        expected = by_hand(q[row], kv[row, :, 0], kv[row, :, 1], length - 1, 0.4, window, **rest)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-5)


def test_decode_mask_counts_from_the_first_gathered_key() -> None:
    mask = decode_mask(torch.tensor([10, 6]), torch.tensor([4, 4]), 8, 3, torch.float32)
    visible = (mask[:, 0, 0] == 0).tolist()
    assert visible[0] == [False, False, False, True, True, True, False, False]
    assert visible[1] == [True, True, False, False, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_tokens_are_gathered(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    kv = torch.zeros(5, 4, 2, HKV, D, dtype=dtype)
    k, v = torch.randn(6, HKV, D).to(dtype), torch.randn(6, HKV, D).to(dtype)
    table, position = torch.tensor([3, 1]), torch.arange(6)
    write_kv(kv, k, v, table[position // 4], position % 4)
    scratch = torch.full((1000,), 9.0, dtype=dtype)
    for gathered in (gather_kv(kv, table), gather_kv(kv, table, scratch)):
        assert gathered.shape == (8, 2, HKV, D)
        assert torch.equal(gathered[:6, 0], k) and torch.equal(gathered[:6, 1], v)
        assert not gathered[6:].any()
    assert not kv[[0, 2, 4]].any()
