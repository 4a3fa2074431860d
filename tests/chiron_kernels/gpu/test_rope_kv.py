"""Norm, rotation and KV write of packed queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from chiron_kernels.gpu.rope_kv import rope_kv_write
from chiron_kernels.reference.rope_kv import rope_kv_write as reference_rope_kv_write

from chiron_engine.model.decoder_ops import TorchOps
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.rope import Rope, RopeSettings
from chiron_engine.model.spec import LayerGeometry

EPS = 1e-6
NUM_BLOCKS = 5
LAYER = 1
"""Of three: there is something to spoil on either side of it."""
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Shape:
    rows: int
    heads: int
    kv_heads: int
    dim: int
    rotary: int
    norm: bool = False
    block_size: int = 4


SHAPES = [
    Shape(1, 1, 1, 2, 2),
    Shape(7, 9, 3, 64, 64, block_size=16),
    Shape(3, 8, 2, 128, 128, norm=True, block_size=1),
    Shape(5, 4, 1, 80, 80, norm=True),
    Shape(5, 2, 2, 96, 96),
    Shape(4, 3, 1, 96, 32),
    Shape(3, 2, 2, 128, 32, norm=True, block_size=64),
    Shape(2, 2, 1, 24, 6, norm=True),
]


def angles(
    rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the model gives them, for far positions too."""
    rope = Rope(RopeSettings(width, 10000.0, "default", {}, 4096), dtype, device)
    return rope.angles(torch.arange(rows, device=device) * 37)


def arguments(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Into a pool of NaN, each row to a place of its own."""
    generator = torch.Generator().manual_seed(shape.rows * shape.dim)
    packed = (shape.heads + 2 * shape.kv_heads) * shape.dim
    qkv = torch.randn(shape.rows, packed, generator=generator).to(device, dtype)
    weights = [torch.randn(shape.dim, generator=generator).to(device, dtype) for _ in range(2)]
    cos, sin = angles(shape.rows, shape.rotary, dtype, device)
    pool = KvPool(
        max(NUM_BLOCKS, shape.rows),
        shape.block_size,
        [LayerGeometry(shape.kv_heads, shape.dim)] * 3,
        dtype,
        device,
    )
    pool.storage.view(dtype).fill_(torch.nan)
    places = torch.randperm(pool.num_blocks * shape.block_size, generator=generator)[: shape.rows].to(device)
    return {
        "qkv": qkv,
        "cos": cos,
        "sin": sin,
        "kv": pool.kv(LAYER),
        "write_blocks": places // shape.block_size,
        "write_offsets": places % shape.block_size,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "q_norm": weights[0] if shape.norm else None,
        "k_norm": weights[1] if shape.norm else None,
        "eps": EPS,
    }


def exact(given: dict[str, Any], weight: str, first: int, count: int) -> torch.Tensor:
    """`count` heads from the `first` on, in float64: normalised, and turned pair by pair."""
    packed = given["heads"] + 2 * given["kv_heads"]
    x = given["qkv"].double().unflatten(1, (packed, -1))[:, first : first + count].clone()
    if given[weight] is not None:
        x *= (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * given[weight].double()
    half = given["cos"].shape[-1] // 2
    cos, sin = given["cos"].double()[..., :half], given["sin"].double()[..., half:]
    low, high = x[..., :half].clone(), x[..., half : 2 * half].clone()
    x[..., :half] = low * cos - high * sin
    x[..., half : 2 * half] = high * cos + low * sin
    return x


def check_result(given: dict[str, Any], q: torch.Tensor) -> None:
    """q and the pool hold what they must, and the pool nothing else."""
    heads, kv_heads, kv, dtype = given["heads"], given["kv_heads"], given["kv"], given["qkv"].dtype
    bound = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(q.double(), exact(given, "q_norm", 0, heads), **bound)
    rows = given["write_blocks"] >= 0
    places = given["write_blocks"][rows], given["write_offsets"][rows]
    keys = exact(given, "k_norm", heads, kv_heads)[rows]
    torch.testing.assert_close(kv[(*places, 0)].double(), keys, **bound)
    values = given["qkv"].unflatten(1, (heads + 2 * kv_heads, -1))[:, heads + kv_heads :][rows]
    assert torch.equal(kv[(*places, 1)], values)
    kv[places] = torch.nan
    whole = torch.empty(0, dtype=dtype, device=kv.device).set_(kv.untyped_storage())
    assert whole.isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    given = arguments(shape, dtype, device)
    before = given["qkv"].clone()
    q = rope_kv_write(**given)
    assert q.is_contiguous()
    assert torch.equal(given["qkv"], before)
    check_result(given, q)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6]], ids=str)
def test_the_reference_equals_float64(shape: Shape, device: torch.device) -> None:
    given = arguments(shape, torch.bfloat16, device)
    check_result(given, reference_rope_kv_write(**given))


def test_padding_is_not_written(device: torch.device) -> None:
    given = arguments(SHAPES[1], torch.float16, device)
    given["write_blocks"][[0, 3, 6]] = -1
    check_result(given, rope_kv_write(**given))


def test_rows_may_lie_apart(device: torch.device) -> None:
    given = arguments(SHAPES[1], torch.bfloat16, device)
    qkv = given["qkv"]
    wide = torch.full((qkv.shape[0], qkv.shape[1] + 3), torch.nan, dtype=qkv.dtype, device=device)
    wide[:, 1:-2] = qkv
    given["qkv"] = wide[:, 1:-2]
    check_result(given, rope_kv_write(**given))


def test_no_rows(device: torch.device) -> None:
    given = arguments(replace(SHAPES[1], rows=0), torch.float16, device)
    assert rope_kv_write(**given).shape == (0, 9, 64)
    assert given["kv"].isnan().all()


def test_agrees_with_the_model_in_float32(device: torch.device) -> None:
    """With the operations that the decoder itself uses."""
    shape = SHAPES[2]
    given = arguments(shape, torch.float32, device)
    heads = given["qkv"].unflatten(1, (-1, shape.dim))
    q, k = heads[:, : shape.heads], heads[:, shape.heads : shape.heads + shape.kv_heads]
    normed = [
        torch.nn.functional.rms_norm(x, (shape.dim,), given[weight], EPS)
        for x, weight in ((q, "q_norm"), (k, "k_norm"))
    ]
    expected = TorchOps().rotated(
        torch.cat(normed, dim=1), shape.heads + shape.kv_heads, (given["cos"], given["sin"])
    )
    found = rope_kv_write(**given)
    torch.testing.assert_close(found, expected[:, : shape.heads], rtol=1e-6, atol=1e-6)
    keys = given["kv"][given["write_blocks"], given["write_offsets"], 0]
    torch.testing.assert_close(keys, expected[:, shape.heads :], rtol=1e-6, atol=1e-6)


def test_blocks_far_apart(device: torch.device) -> None:
    """The last block begins past 2^31 elements. Only what is touched takes memory on the CPU."""
    given = arguments(replace(SHAPES[4], rows=2), torch.float16, device)
    shape = given["kv"].shape[1:]
    size, stride = shape.numel(), 2**31 // 2 + 64
    memory = torch.empty(2 * stride + size, dtype=torch.float16, device=device)
    kv = memory.as_strided((3, *shape), (stride, *given["kv"].stride()[1:]))
    kv.fill_(torch.nan)
    given["kv"] = kv
    given["write_blocks"] = torch.tensor([2, 0], device=device)
    q = rope_kv_write(**given)
    written = kv.flatten(2).isnan().logical_not().all(-1)
    assert written.nonzero().tolist() == sorted(
        [block, offset] for block, offset in zip((2, 0), given["write_offsets"].tolist(), strict=True)
    )
    torch.testing.assert_close(q.double(), exact(given, "q_norm", 0, 2), rtol=1e-3, atol=1e-3)
    keys = kv[given["write_blocks"], given["write_offsets"], 0]
    torch.testing.assert_close(keys.double(), exact(given, "k_norm", 2, 2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("qkv", lambda x: x[0], r"qkv is \[960\]; it must be \[any, any\]"),
        ("qkv", lambda x: x.double(), "qkv is float64"),
        ("qkv", lambda x: x.T.contiguous().T, "qkv has stride 7 in its last dimension"),
        ("qkv", lambda x: x[:, :-1], "qkv has rows of 959; they must be of 15 heads"),
        ("qkv", lambda x: x[:, :0], "qkv has rows of 0"),
        ("heads", lambda heads: 0, "heads is 0"),
        ("kv_heads", lambda heads: -1, "kv_heads -1"),
        ("cos", lambda x: x[:, 0], r"cos is \[7, 64\]; it must be \[7, 1, any\]"),
        ("cos", lambda x: x[..., :63], "cos has rows of 63; they must be of an even number from 2 to 64"),
        ("cos", lambda x: x.repeat(1, 1, 2), "cos has rows of 128"),
        ("cos", lambda x: x.float(), "cos is float32; it must be float16"),
        ("cos", lambda x: x.repeat(1, 1, 2)[..., ::2], "cos has strides"),
        ("sin", lambda x: x[..., :32], r"sin is \[7, 1, 32\]; it must be \[7, 1, 64\]"),
        ("sin", lambda x: x.to("meta"), "sin is on meta"),
        ("kv", lambda x: x[:, :, :, :2], r"kv is \[7, 16, 2, 2, 64\]; it must be \[any, any, 2, 3, 64\]"),
        ("kv", lambda x: x.float(), "kv is float32; it must be float16"),
        ("kv", lambda x: x[:, ::2], "kv has strides"),
        ("kv", lambda x: x.to("meta"), "kv is on meta"),
        ("write_blocks", lambda x: x[:6], r"write_blocks is \[6\]; it must be \[7\]"),
        ("write_blocks", lambda x: x.int(), "write_blocks is int32; it must be int64"),
        ("write_offsets", lambda x: x.repeat(2)[::2], "write_offsets has stride 2"),
        ("write_offsets", lambda x: x.to("meta"), "write_offsets is on meta"),
        ("q_norm", lambda x: torch.ones(64), "q_norm and k_norm are given one without the other"),
    ],
)
def test_bad_arguments_are_named(name: str, change, says: str, device: torch.device) -> None:
    given = arguments(SHAPES[1], torch.float16, device)
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=says):
        rope_kv_write(**given)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("q_norm", lambda x: x[:64], r"q_norm is \[64\]; it must be \[128\]"),
        ("k_norm", lambda x: x.int(), "k_norm is int32"),
        ("k_norm", lambda x: x.repeat(2)[::2], "k_norm has strides"),
        ("k_norm", lambda x: x.to("meta"), "k_norm is on meta"),
    ],
)
def test_bad_weights_are_named(name: str, change, says: str, device: torch.device) -> None:
    given = arguments(SHAPES[2], torch.float16, device)
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=says):
        rope_kv_write(**given)
