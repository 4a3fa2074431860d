"""Attention of chunks of prompts over the paged pool: edges, geometries, and what must not be read."""

from __future__ import annotations

import pytest
import torch
from chiron_kernels.gpu import eight_bits
from chiron_kernels.gpu import prefill_attention as prefill_module
from chiron_kernels.gpu.launch import Launch
from chiron_kernels.gpu.paged_kv import EIGHT_BITS
from chiron_kernels.gpu.prefill_attention import prefill_attention, prefill_attention_launch

from tests.chiron_kernels.gpu.eight_bit_gpus import needs_8_bits
from tests.chiron_kernels.gpu.prefill_steps import TOLERANCE, check, far_pool, step

EDGES = [(1, 0), (16, 1), (17, 15), (0, 30), (15, 16), (33, 17), (1, 63), (2, 64), (3, 62)]
"""Tokens and context: one row, none, around pages of 16 tokens, blocks of 16 rows and tiles of 64 keys."""

LONG = [(5, 200), (40, 90)]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and not written shows."""
    empty = torch.empty

    def poisoned(*shape, **options) -> torch.Tensor:
        memory = empty(*shape, **options)
        return memory.fill_(float("nan") if memory.is_floating_point() else -(1 << 20))

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [4, 16, 64])
def test_edges(dtype: torch.dtype, block_size: int, device: torch.device) -> None:
    check(step(EDGES, device, heads=(2, 1), dtype=dtype, block_size=block_size), rows=32)


@pytest.mark.parametrize("block_size", [1, 32, 128])
def test_other_block_sizes(block_size: int, device: torch.device) -> None:
    check(step([(3, 130), (20, 0)], device, block_size=block_size))


@pytest.mark.parametrize("tokens", [63, 64, 65, 129])
@pytest.mark.parametrize("rows", [64, 128])
def test_a_chunk_about_as_long_as_tiles_and_blocks(tokens: int, rows: int, device: torch.device) -> None:
    check(step([(tokens, 0)], device, heads=(1, 1), block_size=64), rows=rows)


@pytest.mark.parametrize("group", [1, 3, 4, 5, 8, 20])
def test_groups_of_heads(group: int, device: torch.device) -> None:
    check(step([(7, 20), (1, 3)], device, heads=(2 * group, 2)), rows=16)


@pytest.mark.parametrize("head_dim", [34, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 64])
def test_head_sizes(head_dim: int, block_size: int, device: torch.device) -> None:
    check(step([(9, 150)], device, head_dim=head_dim, block_size=block_size))


@pytest.mark.parametrize("window", [1, 5, 16, 64, 100, 1000])
@pytest.mark.parametrize("block_size", [16, 64])
def test_window(window: int, block_size: int, device: torch.device) -> None:
    given = step(LONG, device, block_size=block_size).without_blocks_before(window)
    check(given, rows=32, window=window)


@pytest.mark.parametrize("window", [127, 128, 129])
def test_window_that_begins_about_a_tile(window: int, device: torch.device) -> None:
    """A tile begins at key 128, the first that the last row, at 256, sees through a window of 129."""
    given = step([(4, 253)], device, heads=(2, 1), block_size=64).without_blocks_before(window)
    check(given, window=window)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("block_size", [16, 64])
def test_softcap_and_sinks_and_window(splits: int, block_size: int, device: torch.device) -> None:
    given = step(LONG, device, heads=(4, 1), block_size=block_size, dtype=torch.bfloat16)
    given = given.without_blocks_before(70)
    sinks = torch.tensor([0.5, -3.0, 60.0, 2.0], device=device)
    check(given, window=70, softcap=2.0, sinks=sinks, splits=splits)


def test_softcap_alone(device: torch.device) -> None:
    check(step(LONG, device, dtype=torch.float32), softcap=1.5)


def test_sinks_alone(device: torch.device) -> None:
    check(step(LONG, device, dtype=torch.float32), sinks=torch.tensor([1.0, 2.0, -5.0, 9.0], device=device))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [None, 1])
def test_sinks_that_are_none(window: int | None, splits: int, device: torch.device) -> None:
    """Of heads without one, where a window of 1 leaves rows that see nothing of their first tile."""
    sinks = torch.tensor([-torch.inf, torch.finfo(torch.float32).min, 0.5, -torch.inf], device=device)
    check(step(LONG, device, dtype=torch.float32), window=window, sinks=sinks, splits=splits)


@pytest.mark.parametrize("splits", [2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splits(splits: int, dtype: torch.dtype, device: torch.device) -> None:
    """More splits than tiles, too; the short chunk has tiles for one alone."""
    given = step([(4, 300), (2, 0)], device, heads=(2, 1), dtype=dtype, block_size=64)
    split = check(given, splits=splits)
    whole = check(given, splits=1)
    assert (split - whole).norm() <= TOLERANCE[dtype] * whole.norm()


def test_no_more_splits_than_the_gpu_has_multiprocessors(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, grids = step([(4, 1500)], device, heads=(2, 1)).arguments(16), []
    monkeypatch.setattr(Launch, "run", lambda launch: grids.append(launch.grid))
    for available, splits in ((132, 2), (1, 1)):
        monkeypatch.setattr(prefill_module, "multiprocessors", lambda device, count=available: count)
        prefill_attention(**given)
        assert grids[0][2] == splits
        grids.clear()


CONTEXTS = [(1, 1), (16, 16), (9, 63), (5, 64), (33, 65), (2, 200)]
"""Rows, and the keys that all of them see."""


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [4, 16, 64])
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_that_all_see_the_context_alone(
    splits: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    given = step(CONTEXTS, device, heads=(4, 1), block_size=block_size, dtype=dtype)
    check(given, rows=32, splits=splits, causal=False)


def test_rows_after_the_context_are_not_read(device: torch.device) -> None:
    """NaN, and no block of the table holds them."""
    given = step([(70, 64)], device, block_size=64)
    given.kv[given.tables[given.table_rows[0], 1:]] = float("nan")
    given.tables[given.table_rows[0], 1:] = 0
    check(given, causal=False)


@pytest.mark.parametrize("rows", [16, 64, 128])
def test_softcap_over_the_context_alone(rows: int, device: torch.device) -> None:
    check(step([(70, 130)], device, heads=(3, 1), block_size=64), rows=rows, softcap=1.5, causal=False)


def test_no_window_where_attention_is_not_causal(device: torch.device) -> None:
    with pytest.raises(ValueError, match="window is 5; where attention is not causal it must be None"):
        prefill_attention(**step([(3, 16)], device).arguments(), window=5, causal=False)


def test_large_scores(device: torch.device) -> None:
    """exp of them would be infinite."""
    given = step([(20, 40)], device)
    check(type(given)(**{**given.__dict__, "scale": 20.0}))


@needs_8_bits
@pytest.mark.parametrize("block_size", [4, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_and_values_of_8_bits(dtype: torch.dtype, block_size: int, device: torch.device) -> None:
    given = step(EDGES, device, heads=(2, 1), dtype=dtype, block_size=block_size, kv_dtype=EIGHT_BITS)
    check(given, rows=32, k_scale=0.4, v_scale=3.0)


@needs_8_bits
@pytest.mark.parametrize("head_dim", [34, 64, 80, 128, 256])
@pytest.mark.parametrize("block_size", [16, 64])
def test_head_sizes_of_8_bits(head_dim: int, block_size: int, device: torch.device) -> None:
    check(step([(9, 150)], device, head_dim=head_dim, block_size=block_size, kv_dtype=EIGHT_BITS))


@needs_8_bits
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("block_size", [16, 64])
def test_options_with_8_bits(splits: int, block_size: int, device: torch.device) -> None:
    """The cap and the sinks are of scores, not of what is stored."""
    given = step(LONG, device, heads=(4, 1), block_size=block_size, dtype=torch.bfloat16, kv_dtype=EIGHT_BITS)
    given = given.without_blocks_before(70)
    sinks = torch.tensor([0.5, -3.0, 60.0, 2.0], device=device)
    check(given, window=70, softcap=2.0, sinks=sinks, splits=splits, k_scale=1.7, v_scale=0.2)


def test_8_bits_need_a_gpu_that_has_them(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bits, "target_architecture", lambda: 86)
    given = step([(3, 20)], device, kv_dtype=EIGHT_BITS)
    with pytest.raises(ValueError, match="kv is float8_e4m3fn; it must be float16"):
        prefill_attention(**given.arguments())


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_in_no_chunk_are_left_alone(splits: int, device: torch.device) -> None:
    check(step([(5, 70), (3, 0)], device, before=4, after=6), splits=splits)


@pytest.mark.parametrize("block_size", [16, 64])
def test_blocks_beyond_31_bits(block_size: int, device: torch.device) -> None:
    stride = 1 << 27
    kv = far_pool(20, block_size, 1, 64, stride, device)
    given = step([(3, 50)], device, heads=(2, 1), block_size=block_size, kv=kv)
    assert int(given.tables.max()) * stride > 1 << 31
    check(given)


def test_contiguous_q_and_one_key_head(device: torch.device) -> None:
    given = step([(5, 30)], device, heads=(4, 1))
    check(type(given)(**{**given.__dict__, "q": given.q.contiguous()}))


@pytest.mark.parametrize("chunks", [[(0, 0)], [(0, 40), (0, 3)]])
@pytest.mark.parametrize("splits", [1, 2])
def test_no_rows(chunks: list[tuple[int, int]], splits: int, device: torch.device) -> None:
    given = step(chunks, device)
    assert prefill_attention(**given.arguments(), splits=splits).shape == (0, 4, 64)


def test_no_chunks(device: torch.device) -> None:
    given = step([(3, 0)], device)
    given = type(given)(
        **{
            **given.__dict__,
            "table_rows": given.table_rows[:0],
            "query_starts": given.query_starts[:1],
            "context_lens": given.context_lens[:0],
        }
    )
    assert prefill_attention(**given.arguments()).isnan().all()


def test_the_same_whatever_else_is_in_the_step(device: torch.device) -> None:
    """Bit for bit: no chunk's result depends on its neighbours."""
    given = step([(6, 33), (20, 5)], device)
    alone = type(given)(
        **{
            **given.__dict__,
            "q": given.q[:6],
            "table_rows": given.table_rows[:1],
            "query_starts": given.query_starts[:2],
            "context_lens": given.context_lens[:1],
        }
    )
    assert torch.equal(check(given, rows=16)[:6], check(alone, rows=16))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("q", lambda x: x.double(), "q is float64; it must be float16, bfloat16, float32"),
        ("q", lambda x: x[0], r"q is \[4, 64\]; it must be \[any, any, any\]"),
        ("q", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "q has strides"),
        ("q", lambda x: x[:, ::2], "q has strides"),
        ("q", lambda x: x[:, :3], "q has 3 heads; they must be a multiple of the 2 of kv"),
        ("q", lambda x: x[..., :32].contiguous(), "kv has heads of 64; they must be of 32"),
        ("kv", lambda x: x.float(), "kv is float32; it must be float16, float8_e4m3fn"),
        ("q", lambda x: x.float(), "kv is float16; it must be float32"),
        ("kv", lambda x: x[:, :, :1], r"kv is .*; it must be \[any, any, 2, any, any\]"),
        ("kv", lambda x: x[:, :12], "kv has blocks of 12 tokens; they must be of a power of two"),
        ("kv", lambda x: x[:, ::2], "kv has strides"),
        ("kv", lambda x: x[:1].expand(5, -1, -1, -1, -1), "kv has strides"),
        ("kv", lambda x: x[:0], "kv is .*; it must have a block and a head at least"),
        ("kv", lambda x: x.new_empty(5, 16, 2, 2, 258), "kv has heads of 258"),
        ("kv", lambda x: x.to("meta"), "kv is on meta"),
        ("tables", lambda x: x.int(), "tables is int32; it must be int64"),
        ("tables", lambda x: x[0], "tables is "),
        ("tables", lambda x: x[:, :0], "tables is .*; its rows must hold a block at least"),
        ("tables", lambda x: x.T.contiguous().T, "tables has stride"),
        ("tables", lambda x: x.to("meta"), "tables is on meta"),
        ("table_rows", lambda x: x[:1], r"table_rows is \[1\]; it must be \[2\]"),
        ("table_rows", lambda x: x.int(), "table_rows is int32; it must be int64"),
        ("query_starts", lambda x: x[:2], r"query_starts is \[2\]; it must be \[3\]"),
        ("query_starts", lambda x: x.int(), "query_starts is int32; it must be int64"),
        ("context_lens", lambda x: x.int(), "context_lens is int32; it must be int64"),
        ("context_lens", lambda x: x.repeat(2)[::2], "context_lens has strides"),
        ("context_lens", lambda x: x[None], "context_lens is "),
        ("scale", lambda x: 0.0, "scale is 0.0; it must be above 0"),
        ("scale", lambda x: float("nan"), "scale is nan; it must be above 0"),
        ("window", lambda x: 0, "window is 0; it must be 1 or more"),
        ("softcap", lambda x: 0.0, "softcap is 0.0; it must be above 0"),
        ("sinks", lambda x: torch.zeros(3), r"sinks is \[3\]; it must be \[4\]"),
        ("sinks", lambda x: torch.zeros(4, dtype=torch.int32), "sinks is int32"),
        ("lse", lambda x: torch.zeros(5, 4).half(), "lse is float16; it must be float32"),
        ("lse", lambda x: torch.zeros(5, 3), r"lse is \[5, 3\]; it must be \[5, 4\]"),
        ("k_scale", lambda x: 0.0, r"k_scale is 0.0; it must be 1\.18e-38 to 8\.51e\+37"),
        ("v_scale", lambda x: float("nan"), "v_scale is nan; it must be"),
        ("splits", lambda x: 0, "splits is 0; it must be 1 to 16"),
        ("splits", lambda x: 17, "splits is 17; it must be 1 to 16"),
        ("max_len", lambda x: -1, "max_len is -1; it must be 0 or more"),
    ],
)
def test_bad_arguments_are_named(name: str, change, says: str, device: torch.device) -> None:
    arguments = step([(3, 20), (2, 0)], device).arguments()
    arguments[name] = change(arguments.get(name))
    if isinstance(arguments[name], torch.Tensor) and arguments[name].device.type == "cpu":
        arguments[name] = arguments[name].to(device)
    with pytest.raises(ValueError, match=says):
        prefill_attention(**arguments)


@pytest.mark.parametrize("splits", [1, 2])
def test_what_is_no_number_is_told(splits: int, device: torch.device) -> None:
    """Rows of a broken query or key become NaN, never what the memory held before."""
    given = step([(3, 40), (2, 9)], device)
    arguments = given.arguments()
    arguments["q"] = arguments["q"].clone()
    arguments["q"][1, 0] = torch.nan
    there = torch.full(arguments["q"].shape, 777.0, dtype=arguments["q"].dtype, device=device)
    out = prefill_attention(**arguments, splits=splits, out=there)
    assert out[1, 0].isnan().all()
    assert (out != 777.0).all()
    assert out[0].isfinite().all() and out[2:].isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
def test_writes_where_it_is_told_to(splits: int, device: torch.device) -> None:
    arguments = step([(3, 20), (1, 7)], device).arguments()
    there = torch.full((6, *arguments["q"].shape[1:]), torch.nan, dtype=arguments["q"].dtype, device=device)
    out = prefill_attention(**arguments, splits=splits, out=there[2:])
    assert out.data_ptr() == there[2:].data_ptr() and there[:2].isnan().all()
    assert torch.equal(out, prefill_attention(**arguments, splits=splits))
    with pytest.raises(ValueError, match="out is "):
        prefill_attention(**arguments, splits=splits, out=there)


def test_blocks_of_another_geometry_are_refused(device: torch.device) -> None:
    given = step([(3, 20)], device)
    other = step([(3, 20)], device, heads=(6, 2))
    with pytest.raises(ValueError, match="blocks are for groups of 3 heads; they must be for 2"):
        prefill_attention(**{**given.arguments(), "blocks": other.blocks()})


@pytest.mark.parametrize(
    ("shapes", "dtypes", "says"),
    [
        (((3, 4, 32), None), (torch.float16, None), r"out is \[3, 4, 32\]; it must be \[3, 4, 64\]"),
        (((3, 4, 64), None), (torch.float32, None), "out is float32; it must be float16"),
        (((2, 3, 4, 64), (2, 3, 5)), (torch.float32, torch.float32), r"sums is \[2, 3, 5\]"),
        (((2, 3, 4, 64), (3, 3, 4)), (torch.float32, torch.float32), "out is "),
        (((2, 3, 4, 64), (2, 3, 4)), (torch.float16, torch.float32), "out is float16; it must be float32"),
    ],
)
def test_bad_outputs_are_named(shapes, dtypes, says: str, device: torch.device) -> None:
    out, sums = (
        None if shape is None else torch.zeros(shape, dtype=dtype, device=device)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    with pytest.raises(ValueError, match=says):
        prefill_attention_launch(**step([(3, 20)], device).arguments(), out=out, sums=sums)
