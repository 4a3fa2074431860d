"""How much of a GPU a block may have, and how many blocks a multiprocessor then holds at once.

Figures from the table "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide,
those of allocation from NVIDIA's occupancy calculator.
"""

from __future__ import annotations

SHARED_OF_BLOCK = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that a block may ask for, by architecture."""

REGISTERS = 65_536
"""Of 32 bits, in a multiprocessor; one block may have all of them."""

_SHARED_OF_MULTIPROCESSOR = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
_SHARED_OF_SYSTEM = 1 << 10  # in each block, beside its own
_SHARED_UNIT = 128
_WARPS = 64
_BLOCKS = 32
_WARP_THREADS = 32
_REGISTER_UNIT = 256  # handed out to a warp


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def registers_of_block(registers: int, threads: int) -> int:
    """As handed out, for `threads` of `registers` each."""
    return _rounded_up(registers * _WARP_THREADS, _REGISTER_UNIT) * -(-threads // _WARP_THREADS)


def blocks_per_multiprocessor(architecture: int, registers: int, threads: int, shared: int) -> int:
    """Blocks that fit side by side; 0 for one that does not fit at all. shared: bytes of a block."""
    if shared > SHARED_OF_BLOCK[architecture]:
        return 0
    taken = _rounded_up(shared + _SHARED_OF_SYSTEM, _SHARED_UNIT)
    return min(
        REGISTERS // registers_of_block(registers, threads),
        _SHARED_OF_MULTIPROCESSOR[architecture] // taken,
        _WARPS // -(-threads // _WARP_THREADS),
        _BLOCKS,
    )
