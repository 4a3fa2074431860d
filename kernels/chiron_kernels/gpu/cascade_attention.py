"""Decode attention where requests begin with the same blocks: these are read once for each group of requests.

    request 0 | prefix of group 0    | rest        |
    request 1 | prefix of group 0    | rest |
    request 2 | prefix of group 1 | rest     |         the parts of a request are joined
    request 3 | prefix of group 1 | rest        |      by the sums of their softmaxes
    request 4 | rest               |

Over a prefix, all query heads of all requests of the group are rows of prefill attention, which reads the
keys once for up to 128 of them. What is left of each request is decode attention; `merge_states` joins the
two. Sinks are in the softmax once, with the rest. FlashInfer (Ye et al. 2025, arXiv:2501.01005) calls this
cascade attention; Hydragen (Juravsky et al. 2024, arXiv:2402.05099) is the same.

What is left of a request begins inside its row of the block tables. To the decode kernel the tables are given
as rows that begin one entry after another, of which it is told the one to start at; nothing is copied:

    tables, 3 columns      a b c
                           d e f
    row 3 * slot + skip    a b c,  b c d,  c d e,  d e f,  e f .        of slot 1 without 1 block: row 4
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chiron_kernels.gpu.checks import check_contiguous, check_device, check_dtype, check_shape
from chiron_kernels.gpu.decode_attention import decode_attention
from chiron_kernels.gpu.decode_plan import DecodeSplits
from chiron_kernels.gpu.decode_splits import decode_splits
from chiron_kernels.gpu.merge_states import merge_states_launch
from chiron_kernels.gpu.paged_kv import STORED, check_kv, check_tables
from chiron_kernels.gpu.prefill_attention import prefill_attention
from chiron_kernels.gpu.query_blocks import QueryBlocks, query_blocks
from chiron_kernels.shared_prefixes import SharedPrefixes


@dataclass(frozen=True, slots=True, eq=False)
class CascadeStep:
    """The work of one decode step, for all layers with this geometry.

    tables: int64 [S, W], with the prefixes. blocks: of the rows over these. rest_tables: of overlapping rows,
    rest_rows: int64 [B], and rest_lens: int64 [B], what is left of each request, as `decode_attention` takes
    them. splits: for these.
    """

    shared: SharedPrefixes
    tables: torch.Tensor
    blocks: QueryBlocks
    rest_tables: torch.Tensor
    rest_rows: torch.Tensor
    rest_lens: torch.Tensor
    splits: DecodeSplits


def cascade_step(
    shared: SharedPrefixes,
    lens: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    table_rows: torch.Tensor,
    heads: int,
    programs: int | None = None,
) -> CascadeStep:
    """What `cascade_attention` needs in this step, for all layers with these heads.

    shared: its values must be as said there for these lens and tables, which only the device could check.
    lens: int64 [B], keys of each request, its new token included; one beyond what a block table holds counts
    as that. kv: a layer of the pool; its shape, dtype and device count. tables: int64 [S, W] and table_rows:
    int64 [B], the block table of each request. heads: of queries. programs: as `decode_splits` has it. Raises
    ValueError for what does not fit.
    """
    check_kv(kv, STORED)
    check_tables(tables)
    check_shape("lens", lens, (None,))
    check_shape("table_rows", table_rows, (len(lens),))
    for name, tensor in (("lens", lens), ("table_rows", table_rows)):
        check_dtype(name, tensor, (torch.int64,))
    check_device(kv, lens=lens, tables=tables, table_rows=table_rows)
    if tables.shape[0] < 1:
        raise ValueError(f"tables is {list(tables.shape)}; it must have a row at least")
    _check_shared(shared, len(lens), kv, tables.shape[1])
    _, block_size, _, kv_heads, head_dim = kv.shape
    if heads < 1 or heads % kv_heads:
        raise ValueError(f"heads is {heads}; it must be a multiple of the {kv_heads} of kv")
    (slots, width), stride = tables.shape, tables.stride(0)
    rest_tables = tables.as_strided(((slots - 1) * stride + 1, width), (1, 1))
    # What is left begins inside a row, so that its end is not the table's as `decode_attention` sees it.
    rest_lens = lens.clamp(max=width * block_size) - shared.skipped
    return CascadeStep(
        shared,
        tables,
        query_blocks(shared.starts, shared.lens, len(shared.members), heads // kv_heads, head_dim),
        rest_tables,
        table_rows * stride + shared.skipped // block_size,
        rest_lens,
        decode_splits(rest_lens, kv, rest_tables, programs=programs),
    )


def _check_shared(shared: SharedPrefixes, requests: int, kv: torch.Tensor, width: int) -> None:
    check_shape("shared.table_rows", shared.table_rows, (None,))
    check_shape("shared.members", shared.members, (requests if shared.everyone else None,))
    groups = len(shared.table_rows)
    for name, tensor, count in (
        ("members", shared.members, len(shared.members)),
        ("starts", shared.starts, groups + 1),
        ("table_rows", shared.table_rows, groups),
        ("lens", shared.lens, groups),
        ("skipped", shared.skipped, requests),
    ):
        name = f"shared.{name}"
        check_shape(name, tensor, (count,))
        check_dtype(name, tensor, (torch.int64,))
        check_contiguous(name, tensor)
        check_device(kv, **{name: tensor})
    if groups < 1:
        raise ValueError("shared has no groups; it must have one at least")
    if len(shared.members) > requests:
        raise ValueError(f"shared has {len(shared.members)} members; there are {requests} requests")
    block_size = kv.shape[1]
    if not block_size <= shared.longest <= width * block_size or shared.longest % block_size:
        raise ValueError(
            f"shared has a longest prefix of {shared.longest} keys; it must be 1 to {width} blocks of "
            f"{block_size}"
        )


def cascade_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    step: CascadeStep,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `decode_attention` computes of one new token of each request, but for rounding: [B, Hq, D].

    q: [B, Hq, D], heads dense, rows any stride apart. kv: [num_blocks, block_size, 2, Hkv, D], a layer of the
    pool, in which the new tokens are already. step: of `cascade_step` for this step and geometry. scale,
    softcap, sinks, lse, k_scale, v_scale, out and the dtypes: as `decode_attention` has them. There is no
    window: with one, a prefix that requests share is soon out of it. Raises ValueError for what does not fit.
    """
    check_shape("q", q, (len(step.rest_lens), None, None))
    if lse is None:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    shared = step.shared
    of_prefix = q if shared.everyone else q.index_select(0, shared.members)
    prefix_lse = torch.empty(of_prefix.shape[:2], dtype=torch.float32, device=q.device)
    prefix = prefill_attention(
        of_prefix, kv, step.tables, shared.table_rows, shared.starts, shared.lens, step.blocks, scale,
        softcap=softcap, lse=prefix_lse, max_len=shared.longest,
        k_scale=k_scale, v_scale=v_scale, causal=False,
    )  # fmt: skip
    out = decode_attention(
        q, kv, step.rest_tables, step.rest_rows, step.rest_lens, step.splits, scale,
        softcap=softcap, sinks=sinks, lse=lse, k_scale=k_scale, v_scale=v_scale, out=out,
    )  # fmt: skip
    places = None if shared.everyone else shared.members
    merge_states_launch(prefix, prefix_lse, out, lse, out, lse, places).run()
    return out
