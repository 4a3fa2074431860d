"""The cases: shapes of models that are served, from latency at one request to bandwidth at many.

Goals of bandwidth are shares of the copy measured in the same run. They are targets, set before anything was
measured.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from benchmarks.activation import ActivationCase
from benchmarks.attention import AttentionCase
from benchmarks.attention_inputs import Request
from benchmarks.block_copy import BlockCopyCase
from benchmarks.case import Case, Goal
from benchmarks.norm import NormCase
from benchmarks.rope_kv import RopeKvCase
from benchmarks.sampling import SampleCase

K = 1024
BLOCK_SIZES = (16, 64)

NOT_COVERED = {
    "torch flex attention as a peer": "compiled anew for each shape, which takes longer than all the rest",
}
"""What these benchmarks leave out, and why."""


def of_copy(percent: float) -> Goal:
    return Goal(percent, "% of copy")


def decode_cases(block_size: int) -> list[AttentionCase]:
    """Llama 3.1 8B (32 query heads, 8 key heads of 128) unless the name says otherwise."""

    def case(name: str, decodes: tuple[int, ...], goal: Goal | None, **shape: Any) -> AttentionCase:
        return AttentionCase(
            name=f"{name} page {block_size}", decodes=decodes, block_size=block_size, goal=goal, **shape
        )

    return [
        case("D1 1 x 1k", (K,), Goal(12, "us")),
        case("D2 1 x 8k", (8 * K,), of_copy(50)),
        case("D3 1 x 32k", (32 * K,), of_copy(75)),
        case("D4 1 x 128k", (128 * K,), of_copy(88)),
        case("D5 8 x 4k", (4 * K,) * 8, of_copy(78)),
        case("D6 32 x 4k", (4 * K,) * 32, of_copy(90)),
        case("D7 64 x 2k", (2 * K,) * 64, of_copy(90)),
        case("D8 256 x 1k", (K,) * 256, of_copy(90)),
        case("D9 70B, an eighth, 64 x 4k", (4 * K,) * 64, of_copy(78), heads=8, kv_heads=1),
        case("D10 a key head for each query head, 16 x 4k", (4 * K,) * 16, of_copy(90), kv_heads=32),
        case("D11 Qwen3 0.6B, 32 x 2k", (2 * K,) * 32, of_copy(85), heads=16),
        case("D12 SmolLM2 135M, 32 x 2k", (2 * K,) * 32, of_copy(60), heads=9, kv_heads=3, head_dim=64),
        case("D13 one of 64k, 63 of 512", (64 * K, *(512,) * 63), of_copy(70)),
        case("D14 3 drafted tokens, 16 x 8k", (8 * K,) * 16, of_copy(85), query_len=4),
        case("D15 window of 4k, 16 x 32k", (32 * K,) * 16, of_copy(80), window=4 * K),
        case(
            "D16 8k shared by 64, and 256 each",
            (8 * K + 256,) * 64,
            Goal(5, "x decode_attention"),
            shared=8 * K,
            cascade=True,
        ),
    ]


EIGHT_BITS_GAIN = 1.6
"""Half the bytes of keys and values, and more to compute with each."""


def eight_bit_cases(block_size: int) -> list[AttentionCase]:
    """The large decodes over keys and values of 8 bits, to be held against the same in bfloat16; and a
    prompt, which has more to compute."""
    large = [case for case in decode_cases(block_size) if case.name.startswith(("D4 ", "D6 ", "D7 ", "D8 "))]
    prompt = next(case for case in prefill_cases(block_size) if case.name.startswith("P5 "))
    goals = [(case, Goal(EIGHT_BITS_GAIN, "x", case.name)) for case in large]
    return [
        replace(case, name=f"8 bits: {case.name}", kv_dtype=torch.float8_e4m3fn, goal=goal)
        for case, goal in [*goals, (prompt, None)]
    ]


SWEEPS = {
    "requests": [(count, 4 * K) for count in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)],
    "keys": [(16, keys) for keys in (128, 256, 512, K, 2 * K, 4 * K, 8 * K, 16 * K)],
}
"""D17: requests and keys of each. Between neighbours bandwidth should not fall by a step, as it does where a
rule for dividing the work switches too early."""

SWEEP_BLOCK_SIZE = 16


def sweep_name(requests: int, keys: int) -> str:
    return f"D17 {requests} x {keys} page {SWEEP_BLOCK_SIZE}"


def sweep_cases() -> list[AttentionCase]:
    points = dict.fromkeys(point for sweep in SWEEPS.values() for point in sweep)
    return [
        AttentionCase(
            name=sweep_name(requests, keys), decodes=(keys,) * requests, block_size=SWEEP_BLOCK_SIZE
        )
        for requests, keys in points
    ]


def prefill_cases(block_size: int) -> list[AttentionCase]:
    """Causal, Llama 3.1 8B."""
    ragged = random.Random(0)
    mixed = tuple(Request(ragged.randint(16, 512), 0) for _ in range(64))

    def case(
        name: str, prompts: tuple[Request, ...], goal: float | None, decodes: tuple[int, ...] = ()
    ) -> AttentionCase:
        return AttentionCase(
            name=f"{name} page {block_size}",
            prompts=prompts,
            decodes=decodes,
            block_size=block_size,
            goal=None if goal is None else Goal(goal, "TFLOP/s"),
        )

    return [
        case("P1 1 x 2k", (Request(2 * K, 0),), 330),
        case("P2 1 x 8k", (Request(8 * K, 0),), 480),
        case("P3 1 x 32k", (Request(32 * K, 0),), 500),
        case("P4 8 x 2k", (Request(2 * K, 0),) * 8, 430),
        case("P5 2k after 8k", (Request(2 * K, 8 * K),), 470),
        case("P6 2k after 32k", (Request(2 * K, 32 * K),), 480),
        case("P7 2k after 8k, and 64 decodes at 4k", (Request(2 * K, 8 * K),), None, (4 * K,) * 64),
        case("P8 64 of 16 to 512", mixed, 258),
    ]


def other_cases() -> list[Case]:
    large = of_copy(85)
    return [
        RopeKvCase(name="E1 rope and KV write, 64 rows", rows=64, goal=Goal(4, "us")),
        RopeKvCase(name="E2 rope and KV write, 8k rows", rows=8 * K, goal=large),
        NormCase(name="E3 add and norm, 64 rows of 4096", rows=64, width=4096, goal=Goal(4, "us")),
        NormCase(name="E4 add and norm, 8k rows of 4096", rows=8 * K, width=4096, goal=large),
        ActivationCase(name="E5 gated activation, 64 rows of 14336", rows=64, width=14336),
        ActivationCase(name="E6 gated activation, 8k rows of 14336", rows=8 * K, width=14336, goal=large),
        SampleCase(name="S1 greedy, 128 rows of 128k", rows=128, vocab=128_256, goal=Goal(35, "us")),
        SampleCase(
            name="S2 top-k and top-p, 1 row of 128k", rows=1, vocab=128_256, drawn=True, goal=Goal(60, "us")
        ),
        SampleCase(
            name="S3 top-k and top-p, 128 rows of 128k",
            rows=128,
            vocab=128_256,
            drawn=True,
            goal=Goal(300, "us"),
        ),
        BlockCopyCase(name="C1 512 blocks of 32 KiB", blocks=512, block_bytes=32 * K),
        BlockCopyCase(name="C2 64 blocks of 2 MiB", blocks=64, block_bytes=2048 * K),
        BlockCopyCase(
            name="C3 512 blocks of 32 KiB to the host",
            blocks=512,
            block_bytes=32 * K,
            to_host=True,
            goal=Goal(45, "GB/s"),
        ),
    ]


def all_cases() -> list[Case]:
    """The most telling first, should time run out."""
    return [
        *(case for size in BLOCK_SIZES for case in decode_cases(size)),
        *(case for size in BLOCK_SIZES for case in eight_bit_cases(size)),
        *prefill_cases(64),
        *other_cases(),
        *prefill_cases(16),
        *sweep_cases(),
    ]
