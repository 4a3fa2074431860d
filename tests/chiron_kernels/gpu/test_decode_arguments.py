"""What decode attention refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chiron_kernels.gpu.decode_attention import decode_attention, decode_attention_launch

from tests.chiron_kernels.gpu.decode_batch import make_batch


def arguments(device: torch.device) -> dict[str, Any]:
    batch = make_batch([3, 70], device, query_len=2)
    return {
        "q": batch.q,
        "kv": batch.kv,
        "tables": batch.tables,
        "table_rows": batch.table_rows,
        "lens": batch.lens,
        "splits": batch.splits(),
        "scale": batch.scale,
        "query_len": 2,
    }


def splits_for(lens: list[int], device: torch.device, **options: Any) -> Any:
    return make_batch(lens, device, **options).splits()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("q", lambda q: q[:3], r"q is \[3, 8, 64\]; it must be \[4, any, 64\]"),
        ("q", lambda q: q.flatten(1), r"q is \[4, 512\]; it must be \[any, any, any\]"),
        ("q", lambda q: q[..., :32], r"q is \[4, 8, 32\]; it must be \[4, any, 64\]"),
        ("q", lambda q: q[:, :5], "q has 5 heads; they must be a multiple of the 2 of kv"),
        ("q", lambda q: q.bfloat16(), "q is bfloat16; it must be float16"),
        ("q", lambda q: q.to("meta"), "q is on meta"),
        ("q", lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "q has stride 8 in its last"),
        ("q", lambda q: q.transpose(0, 1).contiguous().transpose(0, 1), "q has heads 256 apart"),
        ("kv", lambda kv: kv[:, :, 0], r"kv is \[\d, 64, 2, 64\]"),
        ("kv", lambda kv: kv[:, :48], "kv has blocks of 48 tokens"),
        ("kv", lambda kv: kv.double(), "kv is float64"),
        ("kv", lambda kv: kv[..., :32], "kv has strides"),
        ("kv", lambda kv: kv[:, :, :, :1].contiguous(), "splits were made for kv_heads 2; .* for 1"),
        ("kv", lambda kv: kv[:, :32], "splits were made for tiles 64; they must be for 32"),
        ("tables", lambda t: t[0], r"tables is \[\d\]; it must be \[any, any\]"),
        ("tables", lambda t: t.int(), "tables is int32; it must be int64"),
        ("tables", lambda t: t[:, :1], "splits were made for table_keys 192; they must be for 64"),
        ("tables", lambda t: t.T.contiguous().T, "tables has stride 4 in its last dimension"),
        ("table_rows", lambda r: r[:1], r"table_rows is \[1\]; it must be \[2\]"),
        ("table_rows", lambda r: r.int(), "table_rows is int32; it must be int64"),
        ("lens", lambda n: n[:1], r"lens is \[1\]; it must be \[2\]"),
        ("lens", lambda n: n.float(), "lens is float32; it must be int64"),
        ("lens", lambda n: n.repeat_interleave(2)[::2], "lens has stride 2"),
        ("query_len", lambda n: 1, "splits were made for query_len 2; they must be for 1"),
        ("window", lambda w: 5, "splits were made for window None; they must be for 5"),
        ("softcap", lambda s: -1.0, "softcap is -1.0; it must be above 0, or None"),
        ("sinks", lambda s: torch.zeros(4), r"sinks is \[4\]; it must be \[8\]"),
        ("sinks", lambda s: torch.zeros(8, dtype=torch.int64), "sinks is int64"),
        ("sinks", lambda s: torch.zeros(16)[::2], "sinks has strides"),
        ("lse", lambda n: torch.zeros(4, 8, dtype=torch.float16), "lse is float16; it must be float32"),
        ("lse", lambda n: torch.zeros(4, 4), r"lse is \[4, 4\]; it must be \[4, 8\]"),
        ("lse", lambda n: torch.zeros(8, 4).T, "lse has strides"),
    ],
)
def test_bad_arguments_are_named(name: str, change: Any, says: str, device: torch.device) -> None:
    good = arguments(device)
    changed = change(good.get(name))
    if isinstance(changed, torch.Tensor) and changed.device.type != "meta":
        changed = changed.to(device) if good.get(name) is None else changed
    with pytest.raises(ValueError, match=says):
        decode_attention(**{**good, name: changed})


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("out", lambda out: out[:2], r"out is \[2, 8, 64\]; it must be \[4, 8, 64\]"),
        ("out", lambda out: out.float(), "out is float32; it must be float16"),
        ("out", lambda out: out.transpose(0, 1).contiguous().transpose(0, 1), "out has strides"),
        ("partial", lambda part: part[:, :, :4], r"partial is \[\d, 2, 4, 64\]; it must be \[\d, 2, 8, 64\]"),
        ("partial", lambda part: part.half(), "partial is float16; it must be float32"),
        ("partial_lse", lambda part: part[:1], r"partial_lse is \[1, 2, 8\]"),
    ],
)
def test_bad_results_are_named(name: str, change: Any, says: str, device: torch.device) -> None:
    good = arguments(device)
    capacity = good["splits"].capacity
    results = {
        "out": torch.empty(4, 8, 64, dtype=torch.float16, device=device),
        "partial": torch.empty(capacity, 2, 8, 64, device=device),
        "partial_lse": torch.empty(capacity, 2, 8, device=device),
    }
    results[name] = change(results[name])
    with pytest.raises(ValueError, match=says):
        decode_attention_launch(
            **good, window=None, softcap=None, sinks=None, lse=None, k_scale=1.0, v_scale=1.0, **results
        )
