"""What the compile gate makes of figures, and how it reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("triton")

from scripts.kernel_gate.baseline import Size, read_baseline, write_baseline
from scripts.kernel_gate.case import Case
from scripts.kernel_gate.compiled import Compiled, Key
from scripts.kernel_gate.device_limits import blocks_per_multiprocessor
from scripts.kernel_gate.judge import find_faults, find_stale
from scripts.kernel_gate.machine_code import MachineCode, parse_opcodes, parse_resources

GOOD = MachineCode(
    registers=100,
    stack=0,
    local=0,
    shared=0,
    instructions=1000,
    spills=0,
    hgmma=24,
    utcmma=8,
    hmma=0,
    tensor_loads=4,
    wide_loads=32,
    narrow_loads=2,
    barriers=1,
)
SIZE = Size(instructions=1000, registers=100)


def launch_nothing():
    raise AssertionError("judging launches nothing")


CASE = Case("attention", launch_nothing, narrow_loads=2, matrix_units=True, tensor_loads=True, barrier=True)


def faults(
    architecture: int = 90,
    threads: int = 256,
    dynamic_shared: int = 0,
    before: Size | None = SIZE,
    **changes: int,
) -> list[str]:
    key = Key("attention", architecture, "3.6.0")
    compiled = Compiled(key, threads, dynamic_shared, dataclasses.replace(GOOD, **changes))
    return [fault.what for fault in find_faults(compiled, CASE, before)]


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_a_good_kernel_has_no_faults(architecture: int) -> None:
    assert faults(architecture) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"spills": 3}, "registers spill: 3 loads and stores of local memory (LDL, STL), limit 0"),
        ({"stack": 16}, "stack of 16 bytes a thread, limit 0"),
        ({"local": 8}, "local memory of 8 bytes a thread, limit 0"),
        ({"dynamic_shared": 232_449}, "shared memory of 232449 bytes a block, limit 232448"),
        (
            {"dynamic_shared": 166_000, "shared": 913, "architecture": 80},
            "shared memory of 166913 bytes a block, limit 166912",
        ),
        ({"threads": 768}, "79872 registers a block (100 x 768 threads), limit 65536"),
        ({"narrow_loads": 3}, "3 loads of under 16 bytes a thread, limit 2"),
        ({"hgmma": 0}, "no matrix instructions of a warp group (HGMMA): 0, at least 1"),
        (
            {"utcmma": 0, "architecture": 100},
            "no matrix instructions of the tensor cores (UTC*MMA): 0, at least 1",
        ),
        ({"tensor_loads": 0}, "no bulk tensor copies (UTMALDG): 0, at least 1"),
        ({"barriers": 0}, "no barrier (BAR): 0, at least 1"),
        ({"instructions": 1101}, "1101 instructions, 10% over the baseline of 1000, limit 10%"),
        ({"registers": 120}, "120 registers, 20% over the baseline of 100, limit 10%"),
        ({"before": None}, "no baseline: take it in with --update"),
    ],
)
def test_each_fault_is_said_with_its_value_and_limit(changes: dict[str, int], says: str) -> None:
    assert faults(**changes) == [says]


@pytest.mark.parametrize(
    "changes",
    [
        {"instructions": 1100},
        {"registers": 110},
        {"dynamic_shared": 232_448},
        {"hgmma": 0, "tensor_loads": 0, "architecture": 80},
        {"hgmma": 0, "architecture": 100},
        {"utcmma": 0},
    ],
)
def test_what_is_within_its_limit_passes(changes: dict[str, int]) -> None:
    assert faults(**changes) == []


def test_the_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "baseline.json"
    sizes = {Key("b | c", 90, "3.9.0"): SIZE, Key("a", 100, "3.6.0"): Size(7, 8), Key("a", 90, "3.6.0"): SIZE}
    write_baseline(path, sizes)
    assert read_baseline(path) == sizes
    lines = path.read_text().splitlines()
    assert [line.split(": ")[0] for line in lines[1:-1]] == [
        '"a | sm_90 | triton 3.6.0"',
        '"a | sm_100 | triton 3.6.0"',
        '"b | c | sm_90 | triton 3.9.0"',
    ]
    stale = find_stale(sizes, [Key("a", 90, "3.6.0"), Key("b | c", 90, "3.9.0")])
    assert [str(fault) for fault in stale] == [
        "a | sm_100 | triton 3.6.0: in the baseline without a case: drop it with --update"
    ]


def test_a_baseline_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "baseline.json").write_text('{"norm": {"instructions": 1, "registers": 2}}')
    with pytest.raises(ValueError, match="entry 'norm'"):
        read_baseline(tmp_path / "baseline.json")


LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P2 LDG.E.128 R12, desc[UR10][R20.64] ;
        /*0020*/              @UP0 LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR10][R20.64] ;
        /*0030*/                   LDG.E.64 R2, desc[UR10][R4.64] ;
.L_x_0:
       /*10040*/                   BRA `(.L_x_0);
       /*10050*/                   NOP;
"""


def test_instructions_are_counted_by_their_full_names() -> None:
    assert parse_opcodes(LISTING) == {
        "LDC": 1,
        "LDG.E.128": 1,
        "LDGSTS.E.BYPASS.LTC128B.128": 1,
        "LDG.E.64": 1,
        "BRA": 1,
    }


def test_a_listing_or_usage_that_says_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no instructions"):
        parse_opcodes(".text.kernel:\n")
    with pytest.raises(ValueError, match="names no LOCAL, SHARED, STACK"):
        parse_resources("Function f:\n REG:32")


def test_resources_are_the_largest_of_all_functions() -> None:
    words = "Function f: REG:32 STACK:0 SHARED:1024 LOCAL:0 Function g: REG:64 STACK:8 SHARED:0 LOCAL:0"
    assert parse_resources(words) == {"REG": 64, "STACK": 8, "SHARED": 1024, "LOCAL": 0}


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 64, 0, 32),  # the most blocks there are
        (128, 128, 0, 4),  # registers: 65,536 / 16,384
        (33, 512, 0, 3),  # 33 are handed out as 40: 65,536 / 20,480
        (32, 128, 65_536, 3),  # shared memory: 228 KiB / 65 KiB
        (32, 1024, 0, 2),  # 64 warps
        (255, 512, 0, 0),
        (32, 128, 232_449, 0),
    ],
)
def test_blocks_of_a_multiprocessor(registers: int, threads: int, shared: int, blocks: int) -> None:
    assert blocks_per_multiprocessor(90, registers, threads, shared) == blocks
